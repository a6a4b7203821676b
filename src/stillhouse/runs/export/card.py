"""The card of an exported student: what it is, how it came to be, how good it is, whose licences it is under.

Everything is read from the run folder and the configuration; the card says nothing that is not written there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from stillhouse import __version__, recipes
from stillhouse.config.writing import dump
from stillhouse.files import locate
from stillhouse.console import Table, TableCell, TableColumn
from stillhouse.console.format import compact_number, duration, is_number, setting_text
from stillhouse.report.metrics import metric_info
from stillhouse.report.record import RunRecord
from stillhouse.report.results import task_results
from stillhouse.report.systems import gather, role_of
from stillhouse.runs.config import RunConfig
from stillhouse.runs.export.licences import HUB, UNKNOWN, licences

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
METRICS = {
    "rouge_l": "rouge",
    "bleu": "bleu",
    "chrf": "chrf",
    "exact_match": "exact_match",
    "accuracy": "accuracy",
}


def card(config: RunConfig, run: RunRecord) -> str:
    """The model card in Markdown, with front matter that the Hugging Face hub understands.

    Args:
        config: the run's configuration.
        run: what its folder holds so far; a card written before the evaluation has no results.
    """
    parts = [_front(config, run), f"# {config.name}", _opening(config, run), _method(config), _data(run)]
    parts += [_results(run), _training(config, run), _again(config, run), _licence(config), _versions(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(config: RunConfig, run: RunRecord) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    own = config.output.licence.student
    known = own is not None and own.lower() in HUB
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=result.task or "held-out prompts",
            metric_type=METRICS[name],
            metric_name=metric_info(name).label,
            metric_value=round(float(result.metrics[name]), 4),
        )
        for result in run.evaluations
        if role_of(result.system) == "after"
        for name in METRICS
        if is_number(result.metrics.get(name))
    ]
    train = config.data.train
    data_set = _hub_name(train.path) if train.kind == "hf" else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "distillation",
            "knowledge-distillation",
            "stillhouse",
            *([config.recipe] if config.recipe else []),
        ],
        license=None if own is None else own.lower() if known else "other",
        license_name=None if known or own is None else own,
        base_model=_hub_name(config.student.path),
        datasets=[data_set] if data_set else None,
        model_name=config.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def _hub_name(path: str | None) -> str | None:
    """A name on the hub, and not a folder that is called like one."""
    return path if path and HUB_NAME.fullmatch(path) and not locate(path).exists() else None


def _opening(config: RunConfig, run: RunRecord) -> str:
    student, teacher = run.models.get("student", {}), run.models.get("teacher", {})
    size = f" with {student['parameters']:,} parameters" if is_number(student.get("parameters")) else ""
    if config.teacher is None:
        return f"A language model{size}, fine-tuned with Stillhouse."
    above = f" ({teacher['parameters']:,} parameters)" if is_number(teacher.get("parameters")) else ""
    start = _short(config.student.path) if config.student.path else None
    begun = f"started from `{start}`" if start else (
        "started from layers of the teacher" if config.student.from_teacher else "started from random weights"
    )  # fmt: skip
    named = getattr(config.teacher, "of", config.teacher)
    path = _short(getattr(named, "path", None) or getattr(named, "model", None) or named.kind)
    return f"A student{size}, distilled from `{path}`{above} with Stillhouse; it {begun}."


def _method(config: RunConfig) -> str:
    lines = ["## Method", ""]
    recipe = _recipe(config)
    if recipe is not None:
        lines += [f"**{recipe.name}**: {recipe.summary}", "", f"- Paper: {recipe.paper or 'none'}"]
        lines += [
            f"- {name}: {text}" for name, text in _noted(recipe.header, ("Loss", "Rounds", "Differences"))
        ]
    objective, responses = (
        dump(_mode(part), flow=True).strip() for part in (config.objective, config.responses)
    )
    return "\n".join([*lines, f"- Objective: `{objective}`", f"- Responses: `{responses}`"])


def _recipe(config: RunConfig) -> recipes.Recipe | None:
    """The recipe, if it is one of the shipped ones."""
    return next((one for one in recipes.all_recipes() if one.name == config.recipe), None)


def _mode(part: Any) -> Any:
    """A part's values without those that are empty."""
    values = part.model_dump(mode="json", exclude_none=True)
    return {name: value for name, value in values.items() if name != "sampling"}


def _noted(header: str, wanted: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The remarks of a recipe's header that begin with one of the wanted words, each as one line.

    What stands in square or angle brackets in Markdown would become a link or an element, so it is escaped.
    """
    name, text = "", list[str]()
    for line in [*header.splitlines(), "End: "]:
        opening = re.match(r"([A-Z][A-Za-z ]*):\s*(.*)", line)
        if opening is None and line.startswith(" "):
            text.append(line.strip())
            continue
        if name in wanted:
            yield name, re.sub(r"([\\*_\[\]<>|])", r"\\\1", " ".join(text))
        name, text = (opening[1], [opening[2]]) if opening else ("", [])


def _data(run: RunRecord) -> str:
    if not run.data:
        return ""
    columns = [
        *(TableColumn(name) for name in ("set", "path")),
        *(TableColumn(name, numeric=True) for name in ("rows", "kept")),
        *(TableColumn(name) for name in ("dropped", "truncated", "SHA-256")),
    ]
    rows = [
        (
            entry.get("name", ""),
            _short(str(entry.get("path", ""))),
            entry.get("rows"),
            entry.get("kept"),
            _counts(entry.get("dropped")),
            _counts(entry.get("truncated")),
            str(entry.get("sha256") or "")[:16],
        )
        for entry in run.data
    ]
    cells = [[TableCell(value, compact_number(value)) for value in row] for row in rows]
    return "\n".join(["## Data", "", Table(columns, cells).markdown().rstrip()])


def _counts(value: Any) -> str:
    found = value if isinstance(value, dict) else {}
    return ", ".join(f"{count:,} {reason}" for reason, count in found.items() if count) or "none"


def _results(run: RunRecord) -> str:
    results = task_results(gather([run]))
    if not results:
        return ""
    parts = [
        "## Results",
        "On held-out prompts; ± is the standard deviation over seeds, with SE behind it a standard error.",
    ]
    for one in results:
        parts.append(one.table.markdown().rstrip())
        parts.append("\n".join(f"- {name}: {value}" for name, value in one.settings))
    return "\n\n".join(parts)


def _training(config: RunConfig, run: RunRecord) -> str:
    rows = run.metrics("train")
    if not rows:
        return ""
    tokens = sum(row["tokens"] for row in rows if is_number(row.get("tokens")))
    seconds = sum(row["seconds"] for row in rows if is_number(row.get("seconds")))
    train = config.train
    facts = {
        "optimiser steps": compact_number(rows[-1]["step"]),
        "response tokens": compact_number(tokens),
        "time": duration(seconds, tenths=True),
        "batch size": compact_number(train.batch_size),
        "learning rate": f"{train.lr:g}",
        "number format": str(run.models.get("student", {}).get("dtype", config.student.dtype)),
        "seed": str(train.seed),
        "device": str(run.environment.get("device", "unknown")),
    }
    return "\n".join(["## Training", "", *(f"- {name}: {value}" for name, value in facts.items())])


def _again(config: RunConfig, run: RunRecord) -> str:
    """How to get it again: what somebody chose, as a YAML file. A shipped recipe gives the rest."""
    shipped = _recipe(config) is not None
    given = {
        path: setting.value
        for path, setting in run.config.items()
        if setting.origin != "default"
        and setting.origin not in run.config  # a limit that follows another setting
        and not (shipped and setting.origin.startswith("recipe "))
        and not path.startswith("output.")
    }
    if not given:
        return ""
    text = dump(_tree(given)).rstrip()
    shown = ["```console", "stillhouse run run.yaml", "```", ""]
    shown += [
        "with `run.yaml` (absolute paths are shortened to their last part):",
        "",
        "```yaml",
        text,
        "```",
    ]
    return "\n".join(["## To make it again", "", *shown])


def _tree(given: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in given.items():
        *above, last = path.split(".")
        here = tree
        for name in above:
            below = here.setdefault(name, {})
            here = below if isinstance(below, dict) else here
        here[last] = _short(value) if isinstance(value, str) else value
    return tree


def _licence(config: RunConfig) -> str:
    names = {"student": "this model", "teacher": "teacher", "start": "what it started from"}
    found = licences(config)
    lines = [f"- {names.get(who, who)}: {licence or UNKNOWN}" for who, licence in found.items()]
    lines.append("")
    lines.append(
        "A student learns from its teacher's outputs and from the data: their terms may bind it too. This "
        "was said by whoever trained it (`output.licence`) or found in the cards beside the files."
    )
    return "\n".join(["## Licences", "", *lines])


def _versions(run: RunRecord) -> str:
    environment = {name: value for name, value in run.environment.items() if name not in ("platform", "git")}
    known = {name: setting_text(value) for name, value in environment.items()}
    shown = ", ".join(f"{name} {value}" for name, value in known.items() if value != "null")
    return f"## Versions\n\n{shown or f'stillhouse {__version__}'}"


def _short(path: str) -> str:
    """An absolute path by its last part: a card travels further than the machine's paths should."""
    return PurePath(path).name if PurePath(path).is_absolute() else path
