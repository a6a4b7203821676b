"""The page: one HTML file that needs no network, opens anywhere and treats all model text as untrusted."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stillhouse import console, files
from stillhouse.console import duration
from stillhouse.console.format import MISSING, compact_number, is_number
from stillhouse.report import (
    breakdown,
    chains,
    configuration,
    curation,
    curves,
    responses,
    results,
    tradeoffs,
)
from stillhouse.report.headline import headline
from stillhouse.report.metrics import metric_info
from stillhouse.report.plots import DASHED
from stillhouse.report.record import RunRecord, load_runs, trained
from stillhouse.report.systems import gather, run_colours


def write_report(folders: Sequence[Path], output: Path, title: str | None = None) -> Path:
    """Write the report of one run, or of several side by side, as a single self-contained HTML file.

    Args:
        folders: run folders, or folders that hold some.
        output: the file to write, such as `runs/kd/report.html`.
        title: the heading; by default the run's name, or how many runs there are.

    Returns:
        `output`.

    Raises:
        DataError: a folder does not exist or holds no run.
        EnvironmentFault: the file cannot be written.
    """
    runs = load_runs(folders, rows="responses")
    html = render(runs, title)
    with files.atomic(output, "wb") as handle:
        # Text from a model may hold half of a surrogate pair, which UTF-8 does not know.
        handle.write(html.encode("utf-8", errors="replace"))
    return output


def render(runs: Sequence[RunRecord], title: str | None = None) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("stillhouse.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    systems, colours = gather(runs), run_colours(runs)
    found = results.task_results(systems)
    script = _asset("page.js")
    return environment.get_template("page.html.j2").render(
        title=title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"),
        runs=runs,
        single=len(runs) == 1,
        headline=headline(systems, found),
        subtitle=_subtitle(runs),
        dashed=DASHED,
        constant_schedules=curves.constant_schedules(runs),
        task_results=found,
        overview=results.overview(systems),
        stage_tables=chains.stage_tables(runs),
        tradeoff_plots=tradeoffs.tradeoff_plots(systems, runs),
        seeds=any(system.members for system in systems),
        glossary=results.glossary(found),
        cards=[_run_card(run, colour) for run, colour in zip(runs, colours, strict=True)],
        run_legend=[(run.name, colour) for run, colour in zip(runs, colours, strict=True)],
        main_plots=curves.main_plots(runs),
        schedule_plots=curves.schedule_plots(runs),
        source_plots=curves.source_plots(runs),
        further_plots=curves.further_plots(runs),
        buffer_plots=curves.buffer_plots(runs),
        source_bars=breakdown.source_bars(runs),
        time_bars=breakdown.time_bars(runs),
        phase_tables=breakdown.phase_tables(runs),
        teaching_tables=breakdown.teaching_tables(runs),
        diversity_plots=curves.diversity_plots(systems),
        draft_plots=curves.draft_plots(systems),
        data_tables=curation.data_tables(runs),
        curated=curation.curated_runs(runs),
        responses=responses.side_by_side(systems),
        compared=[
            (run.name, colour) for run, colour in zip(runs, colours, strict=True) if run in trained(runs)
        ],
        config_diff=configuration.config_diff(trained(runs)),
        not_set=configuration.NOT_SET,
        configs=configuration.config_tables(runs),
        environments=configuration.environments(runs),
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _subtitle(runs: Sequence[RunRecord]) -> list[str]:
    """When, how long, with which version."""
    parts: list[str] = []
    started = sorted(
        str(run.state["started"])[:16].replace("T", " ") for run in runs if run.state.get("started")
    )
    parts += started[:1]
    seconds = [run.state["seconds"] for run in runs if is_number(run.state.get("seconds"))]
    parts += [duration(sum(seconds), tenths=True)] if seconds else []
    versions = dict.fromkeys(
        str(run.environment["stillhouse"]) for run in runs if run.environment.get("stillhouse")
    )
    parts += [f"Stillhouse {', '.join(versions)}"] if versions else []
    return parts


def _run_card(run: RunRecord, colour: str) -> dict[str, Any]:
    """What one run was, in a few lines."""
    facts = [("Recipe", run.recipe), ("Stage", run.does), ("Left", chains.rows_text(chains.rows_of(run)))]
    facts += [
        (name.replace("teachers.", "teacher ").capitalize(), _model(model))
        for name, model in run.models.items()
    ]
    facts += [(f"Data: {entry.get('name', '?')}", _set(entry)) for entry in run.data]
    train = run.metrics("train")
    if train:
        facts.append(("Steps", compact_number(train[-1]["step"])))
        tokens = [row["tokens"] for row in train if is_number(row.get("tokens"))]
        if tokens:
            facts.append(("Tokens", metric_info("parameters").show(sum(tokens))))
        facts.append(("Generated", breakdown.generated_tokens(run)))
        facts.append(("Memory of the GPU", breakdown.device_memory_told(run)))
    facts.append(("Took", duration(run.state.get("seconds"), tenths=True)))
    return {
        "name": run.name,
        "status": run.status,
        "colour": colour,
        "message": str(run.state.get("message") or ""),
        "facts": [(name, value) for name, value in facts if value and value != MISSING],
        "command": _command(str(run.state.get("command") or "")),
        "problems": [*run.warnings, *run.problems],
        "folder": run.folder.name,
    }


def _command(text: str) -> str:
    """The command as somebody would type it: absolute paths by their last part, the program's too."""
    return re.sub(r"(^|(?<=[\s=]))/\S+", lambda found: configuration.short_path(found[0]), text)


def _model(model: dict[str, Any]) -> str:
    parts = [configuration.model_name(str(model["path"]))] if model.get("path") else []
    size, trainable, adapter = (model.get(name) for name in ("parameters", "trainable", "adapter"))
    if is_number(size):
        parts.append(f"{metric_info('parameters').show(size)} parameters")
    if is_number(adapter):
        parts.append(f"an adapter of {metric_info('parameters').show(adapter)} trained")
    elif is_number(trainable) and is_number(size) and 0 < trainable < size:
        parts.append(f"{metric_info('parameters').show(trainable)} of them trained")
    if is_number(model.get("bytes")):
        parts.append(metric_info("bytes").show(model["bytes"]))
    if model.get("kept"):
        parts.append(f"started as the teacher with {model['kept']}")
    return ", ".join(parts)


def _set(entry: dict[str, Any]) -> str:
    rows, kept = entry.get("rows"), entry.get("kept")
    count = kept if is_number(kept) else rows
    text = f"{compact_number(count)} rows" if is_number(count) else ""
    with_response = entry.get("with_response")
    if is_number(with_response) and with_response != kept:
        text += f", {compact_number(with_response)} with a response"
    return text


def _visible(value: object) -> object:
    """Every text that goes into the page, with control characters shown; finished markup stays as it is."""
    return console.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return (resources.files("stillhouse.report") / "templates" / name).read_text(encoding="utf-8")
