"""What each section of the page says, as plain data for the template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.report.measures import compact, duration, is_number, measure, plain
from stillhouse.report.record import RunRecord
from stillhouse.report.systems import run_colour
from stillhouse.report.work import written_for

NOT_SET = "not set"


def subtitle(runs: Sequence[RunRecord]) -> str:
    """When, how long, with which version."""
    parts: list[str] = []
    started = sorted(
        str(run.state["started"])[:16].replace("T", " ") for run in runs if run.state.get("started")
    )
    parts += started[:1]
    seconds = [run.state["seconds"] for run in runs if is_number(run.state.get("seconds"))]
    parts += [duration(sum(seconds))] if seconds else []
    versions = dict.fromkeys(
        str(run.environment["stillhouse"]) for run in runs if run.environment.get("stillhouse")
    )
    parts += [f"Stillhouse {', '.join(versions)}"] if versions else []
    return " · ".join(parts)


def run_card(index: int, run: RunRecord) -> dict[str, Any]:
    """What one run was, in a few lines."""
    facts = [("Recipe", run.recipe)]
    facts += [(name.capitalize(), _model(model)) for name, model in run.models.items()]
    facts += [(f"Data: {entry.get('name', '?')}", _set(entry)) for entry in run.data]
    train = run.metrics("train")
    if train:
        facts.append(("Steps", compact(train[-1]["step"])))
        tokens = [row["tokens"] for row in train if is_number(row.get("tokens"))]
        if tokens:
            facts.append(("Tokens", measure("parameters").show(sum(tokens))))
        facts.append(("Written", written_for(run)))
    facts.append(("Took", duration(run.state.get("seconds"))))
    return {
        "name": run.name,
        "status": run.status,
        "colour": run_colour(index),
        "message": str(run.state.get("message") or ""),
        "facts": [(name, value) for name, value in facts if value and value != "–"],
        "command": _command(str(run.state.get("command") or "")),
        "problems": [*run.warnings, *run.problems],
        "folder": run.folder.name,
    }


def _command(text: str) -> str:
    """The command as somebody would type it: absolute paths by their last part, the program's too."""
    return re.sub(r"(^|(?<=[\s=]))/\S+", lambda found: _short(found[0]), text)


def _model(model: dict[str, Any]) -> str:
    parts = [str(model["path"]).rstrip("/").rsplit("/", 1)[-1]] if model.get("path") else []
    size, trainable = model.get("parameters"), model.get("trainable")
    if is_number(size):
        parts.append(f"{measure('parameters').show(size)} parameters")
    if is_number(trainable) and is_number(size) and 0 < trainable < size:
        parts.append(f"{measure('parameters').show(trainable)} of them trained")
    if is_number(model.get("bytes")):
        parts.append(measure("bytes").show(model["bytes"]))
    return ", ".join(parts)


def _set(entry: dict[str, Any]) -> str:
    rows, kept = entry.get("rows"), entry.get("kept")
    count = kept if is_number(kept) else rows
    text = f"{compact(count)} rows" if is_number(count) else ""
    with_response = entry.get("with_response")
    if is_number(with_response) and with_response != kept:
        text += f", {compact(with_response)} with a response"
    return text


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting with its value in each run. Example: `Difference("train.lr", ("0.001", "0.002"))`"""

    path: str
    values: tuple[str, ...]

    @property
    def partial(self) -> bool:
        """Whether only some of the runs have it."""
        return NOT_SET in self.values


def config_diff(runs: Sequence[RunRecord]) -> list[Difference]:
    """Settings that are not the same in all runs; those that all runs have come first.

    Left out are the names of the runs, and defaults of parts that only some of the runs have, which follow
    from the part's kind.
    """
    if len(runs) < 2:
        return []
    paths = dict.fromkeys(path for run in runs for path in run.config)
    rows = []
    for path in paths:
        known = [run.config[path] for run in runs if path in run.config]
        follows = len(known) < len(runs) and all(setting.origin == "default" for setting in known)
        values = [plain(run.config[path].value) if path in run.config else NOT_SET for run in runs]
        if len(set(values)) > 1 and not follows and path not in ("name", "output.folder"):
            rows.append(Difference(path, tuple(values)))
    return sorted(rows, key=lambda row: row.partial)


def config_tables(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every setting of every run with its origin; `given` tells those that somebody chose."""
    return [
        {
            "name": run.name,
            "rows": [
                {
                    "path": setting.path,
                    "value": plain(setting.value),
                    "origin": _short(setting.origin),
                    "given": setting.origin != "default",
                }
                for setting in run.config.values()
            ],
        }
        for run in runs
        if run.config
    ]


def _short(origin: str) -> str:
    """The file's name without its folders: the page may travel further than the machine's paths should."""
    return origin.replace("\\", "/").rsplit("/", 1)[-1] if origin != "command line" else origin


def environments(runs: Sequence[RunRecord]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Versions and machine; runs of the same environment share one list."""
    grouped: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.environment:
            grouped.setdefault(json.dumps(run.environment, sort_keys=True, default=str), []).append(run)
    return [
        (
            "" if len(same) == len(runs) else ", ".join(run.name for run in same),
            [(str(name), plain(value)) for name, value in same[0].environment.items()],
        )
        for same in grouped.values()
    ]
