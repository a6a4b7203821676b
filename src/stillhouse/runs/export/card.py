"""The card of an exported student: what it is, how it came to be, how good it is, whose licences it is under.

Everything is read from the run folder and the configuration; the card says nothing that is not written there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stillhouse import __version__, recipes
from stillhouse.config import StrictConfig
from stillhouse.config.writing import dump
from stillhouse.console import Table, TableCell, TableColumn
from stillhouse.console.format import compact_number, duration, is_number, setting_text
from stillhouse.core.requirements import MAIN, teacher_path
from stillhouse.files import locate
from stillhouse.report.configuration import value_text
from stillhouse.report.curation import evaluation_sets
from stillhouse.report.history import history_lines, parent_text
from stillhouse.report.metrics import metric_info
from stillhouse.report.record import RunRecord
from stillhouse.report.results import task_results
from stillhouse.report.systems import gather, role_of
from stillhouse.runs.config import RunConfig
from stillhouse.runs.export.licences import HUB_LICENCES, find_licences
from stillhouse.runs.export.usage import UsageExample
from stillhouse.teachers import TeacherConfig

TEMPLATE = Path(__file__).with_name("card.md.j2")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_METRICS = {name: name for name in ("bleu", "chrf", "exact_match", "accuracy")} | {"rouge_l": "rouge"}
"""Our metrics that the hub has a name for."""


def model_card(config: RunConfig, run: RunRecord, usage: UsageExample | None = None) -> ModelCard:
    """The model card, with metadata that the Hugging Face hub understands.

    Args:
        config: the run's configuration.
        run: what its folder holds so far; a card written before the evaluation has no results.
        usage: how the student is called, with an answer of it.
    """
    recipe = next((one for one in recipes.all_recipes() if one.name == config.recipe), None)
    chosen = _chosen(run, shipped=recipe is not None)
    return ModelCard.from_template(
        _metadata(config, run),
        template_path=str(TEMPLATE),
        name=config.name,
        opening=_opening(config, run),
        usage=usage,
        vision=_vision(run),
        fence=_fence(usage),
        recipe=recipe,
        notes=list(_notes(recipe.header, ("Loss", "Rounds", "Differences"))) if recipe else [],
        objective=_flow(config.objective),
        responses=_flow(config.responses),
        data=_data_table(run),
        results=task_results(gather([run])),
        training=_training(config, run),
        settings=dump(_tree(chosen)).rstrip() if chosen else "",
        shortened=any(isinstance(value, str) and _short(value) != value for value in chosen.values()),
        history=history_lines(run.state),
        taught=bool(config.all_teachers),
        licences=find_licences(config),
        versions=_versions(run),
    )


def _metadata(config: RunConfig, run: RunRecord) -> ModelCardData:
    licence = config.output.licence.student
    on_hub = licence is not None and licence.lower() in HUB_LICENCES
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=result.task or "held-out prompts",
            metric_type=HUB_METRICS[name],
            metric_name=metric_info(name).label,
            metric_value=round(float(result.metrics[name]), 4),
        )
        for result in run.evaluations
        if role_of(result.system) == "after"
        for name in HUB_METRICS
        if is_number(result.metrics.get(name))
    ]
    train = config.data.train
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if _vision(run) else "text-generation",
        tags=["distillation", "knowledge-distillation", "stillhouse", *filter(None, [config.recipe])],
        license=None if licence is None else licence.lower() if on_hub else "other",
        license_name=None if on_hub else licence,
        base_model=_hub_name(config.student.path),
        datasets=_hub_name(train.title) if train.kind == "hf" else None,
        model_name=config.name if results else None,
        eval_results=results or None,
    )


def _fence(usage: UsageExample | None) -> str:
    """Backticks that close no block in the usage too early."""
    text = "" if usage is None else usage.code + usage.answer
    return "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))


def _hub_name(path: str | None) -> str | None:
    """A name on the hub, and not a folder that is called like one."""
    return path if path and HUB_NAME.fullmatch(path) and not locate(path).exists() else None


def _opening(config: RunConfig, run: RunRecord) -> str:
    student = run.models.get("student", {})
    size = f" with {student['parameters']:,} parameters" if is_number(student.get("parameters")) else ""
    if not config.all_teachers:
        kind = "vision-language" if _vision(run) else "language"
        return f"A {kind} model{size}, fine-tuned with Stillhouse."
    start = _short(config.student.path) if config.student.path else None
    if parent := parent_text(run.state):
        start = f"{start}`, the student of `{parent}"
    begun = f"started from `{start}`" if start else (
        "started from parts of the teacher" if config.student.from_teacher else "started from random weights"
    )  # fmt: skip
    above = " and ".join(_teacher(name, teacher, run) for name, teacher in config.all_teachers.items())
    kind = "vision-language student" if _vision(run) else "student"
    return f"A {kind}{size}, distilled from {above} with Stillhouse; it {begun}."


def _vision(run: RunRecord) -> dict[str, str]:
    """Of a vision-language student: its tower, its projector and what reads images for it."""
    facts = run.models.get("student", {}).get("vision")
    if not facts:
        return {}

    def told(part: str) -> str:
        trained = "trained" if facts[f"{part}_trained"] else "as it started"
        return f"{facts[f'{part}_parameters']:,} parameters, {trained}"

    return {
        "Vision tower": f"`{facts['tower']}`, {told('tower')}",
        "Projector": told("projector"),
        "Processor": f"the one of `{_short(facts['processor'])}`, whose files are in this folder",
    }


def _teacher(name: str, teacher: TeacherConfig, run: RunRecord) -> str:
    """A teacher's model with its size and, unless it is the main one, its name in the run."""
    named = getattr(teacher, "of", teacher)
    path = _short(getattr(named, "path", None) or getattr(named, "model", None) or named.kind)
    size = run.models.get(teacher_path(name), {}).get("parameters")
    facts = [] if name == MAIN else [name]
    if is_number(size):
        facts.append(f"{size:,} parameters")
    return f"`{path}`" + (f" ({', '.join(facts)})" if facts else "")


def _flow(part: StrictConfig) -> str:
    """A part's values in one line, without those that are empty."""
    return dump(part.model_dump(mode="json", exclude_none=True, exclude={"sampling"}), flow=True).strip()


def _notes(header: str, wanted: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The notes of a recipe's header that begin with one of the wanted words, each as one line.

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


def _data_table(run: RunRecord) -> str:
    sets = [*run.data, *evaluation_sets(run)]
    if not sets:
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
        for entry in sets
    ]
    cells = [[TableCell(value, compact_number(value)) for value in row] for row in rows]
    return Table(columns, cells).markdown().rstrip()


def _counts(value: Any) -> str:
    found = value if isinstance(value, dict) else {}
    return ", ".join(f"{count:,} {reason}" for reason, count in found.items() if count) or "none"


def _training(config: RunConfig, run: RunRecord) -> dict[str, str]:
    rows = run.metrics("train")
    if not rows:
        return {}
    tokens = sum(row["tokens"] for row in rows if is_number(row.get("tokens")))
    seconds = sum(row["seconds"] for row in rows if is_number(row.get("seconds")))
    train = config.train
    return {
        "optimiser steps": compact_number(rows[-1]["step"]),
        "response tokens": compact_number(tokens),
        "time": duration(seconds, tenths=True),
        "batch size": compact_number(train.batch_size),
        "learning rate": value_text(run, "train.lr") if "train.lr" in run.config else f"{train.lr:g}",
        "dtype": str(run.models.get("student", {}).get("dtype", config.student.dtype)),
        "seed": str(train.seed),
        "device": str(run.environment.get("device", "unknown")),
    }


def _chosen(run: RunRecord, shipped: bool) -> dict[str, Any]:
    """The settings that somebody chose, by their path: those that give the student again.

    Args:
        run: has the origin of each setting.
        shipped: whether a shipped recipe gives the rest.
    """
    return {
        path: setting.value
        for path, setting in run.config.items()
        if setting.origin != "default"
        and setting.origin not in run.config  # a limit that follows another setting
        and not (shipped and setting.origin.startswith("recipe "))
        and not path.startswith("output.")
    }


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


def _versions(run: RunRecord) -> str:
    environment = {name: value for name, value in run.environment.items() if name not in ("platform", "git")}
    known = {name: setting_text(value) for name, value in environment.items()}
    shown = ", ".join(f"{name} {value}" for name, value in known.items() if value != "null")
    return shown or f"stillhouse {__version__}"


def _short(path: str) -> str:
    """An absolute path by its last part: a card travels further than the machine's paths should."""
    return PurePath(path).name if PurePath(path).is_absolute() else path
