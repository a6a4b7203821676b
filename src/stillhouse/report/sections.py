"""What each section of the page says, as plain data for the template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stillhouse.report.measures import compact, duration, is_number, measure, plain
from stillhouse.report.record import RunRecord
from stillhouse.report.systems import run_colour

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
    """The command as somebody would type it: the program without its folder."""
    program, gap, rest = text.partition(" ")
    return _short(program) + gap + rest


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


def data_tables(runs: Sequence[RunRecord]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The data sets with what was dropped and why; runs with the same data share one table."""
    grouped: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.data:
            grouped.setdefault(json.dumps(run.data, sort_keys=True, default=str), []).append(run)
    tables = []
    for same in grouped.values():
        whole = len(same) == len(runs)
        heading = (
            ("" if len(runs) == 1 else "the same in all runs") if whole else ", ".join(r.name for r in same)
        )
        tables.append((heading, [_data_row(entry) for entry in same[0].data]))
    return tables


def _data_row(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": str(entry.get("name", "")),
        "path": str(entry.get("path", "")),
        "sha256": str(entry.get("sha256") or "")[:12],
        "rows": _count(entry.get("rows")),
        "kept": _count(entry.get("kept")),
        "responses": _count(entry.get("with_response")),
        "dropped": _counts(entry.get("dropped")),
        "truncated": _counts(entry.get("truncated")),
    }


def _counts(value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [(str(reason).replace("_", " "), _count(count)) for reason, count in value.items() if count]
    return [("rows", _count(value))] if value else []


def _count(value: Any) -> str:
    return compact(value) if is_number(value) else "–" if value is None else str(value)


def config_diff(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: path and the value in each run; what all runs have first.

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
            rows.append((path, values))
    return sorted(rows, key=lambda row: NOT_SET in row[1])


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
