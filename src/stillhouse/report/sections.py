"""What each section of the page says, as plain data for the template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from stillhouse.report.measures import Measure, columns, compact, duration, is_number, measure
from stillhouse.report.record import RunRecord
from stillhouse.report.systems import System, baseline, run_colour, teacher_of

NOT_SET = "not set"


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the results table, with its spread, its change, and a bar from 0 to 1 for the first
    column."""

    text: str
    spread: str = ""
    note: str = ""
    good: bool | None = None
    best: bool = False
    bar: float | None = None


@dataclass(frozen=True, slots=True)
class ResultTable:
    """All systems on one task."""

    task: str
    """Empty where it needs no mention."""
    columns: list[Measure]
    rows: list[tuple[System, list[Cell]]]
    settings: list[tuple[str, str]]
    more: ResultTable | None = None
    """The measures that do not stand in the first table."""


def result_tables(systems: Sequence[System]) -> list[ResultTable]:
    """One table for each task."""
    tables = []
    for task in dict.fromkeys(system.task for system in systems):
        here = [system for system in systems if system.task == task]
        known = columns(system.metrics for system in here)
        more = _table(task, here, [column for column in known if not column.main])
        first = _table(task, here, [column for column in known if column.main])
        tables.append(replace(first, more=more if more.columns else None))
    return tables


def _table(task: str, systems: Sequence[System], shown: list[Measure]) -> ResultTable:
    best = {column.name: _best(column, systems) for column in shown}
    rows = [(one, [_cell(column, one, systems, best[column.name]) for column in shown]) for one in systems]
    return ResultTable(task, shown, rows, _settings(systems))


def _best(column: Measure, systems: Sequence[System]) -> float | None:
    """The best value among several trained students; None where there is nothing to choose."""
    values = [
        s.metrics[column.name] for s in systems if s.role == "after" and is_number(s.metrics.get(column.name))
    ]
    if column.kind != "quality" or column.better is None or len(set(values)) < 2:
        return None
    return max(values) if column.better == "higher" else min(values)


def _cell(column: Measure, system: System, systems: Sequence[System], best: float | None) -> Cell:
    value = system.metrics.get(column.name)
    if not is_number(value):
        return Cell(column.show(value))
    spread = system.metrics.get(f"{column.name}_std")
    note, good = _change(column, value, system, systems)
    tops = [s.metrics[column.name] for s in systems if is_number(s.metrics.get(column.name))]
    bar = value / max(tops) if column.name == "rouge_l" and max(tops) > 0 else None
    shown_spread = f"± {column.show(spread)}" if is_number(spread) and spread > 0 else ""
    return Cell(column.show(value), shown_spread, note, good, best is not None and value == best, bar)


def _change(
    column: Measure, value: float, system: System, systems: Sequence[System]
) -> tuple[str, bool | None]:
    """Quality against the student before; size and speed against the teacher."""
    if column.kind in ("size", "speed"):
        teacher = teacher_of(systems, system)
        other = teacher.metrics.get(column.name) if teacher else None
        if system.role == "teacher" or not is_number(other) or not other or not value:
            return "", None
        if column.kind == "size":
            return (f"{compact(round(other / value, 1))}× smaller", None) if value < other else ("", None)
        return f"{compact(round(value / other, 1))}× the teacher", None
    before = baseline(systems, system)
    reference = before.metrics.get(column.name) if before else None
    if system.role != "after" or column.kind != "quality" or not is_number(reference):
        return "", None
    return column.change(value, reference), column.improves(value, reference)


def _settings(systems: Sequence[System]) -> list[tuple[str, str]]:
    """How a task was measured; where systems differ, what each of them had."""
    names = dict.fromkeys(name for system in systems for name in system.settings)
    found = []
    for name in names:
        values = {system.label: plain(system.settings.get(name)) for system in systems}
        same = len(set(values.values())) == 1
        text = (
            next(iter(values.values()))
            if same
            else "; ".join(f"{who}: {value}" for who, value in values.items())
        )
        found.append((name.replace("_", " ").capitalize(), text))
    return found


def headline(systems: Sequence[System], tables: Sequence[ResultTable]) -> dict[str, Any] | None:
    """The best trained student of the first task in three or four figures; None where nothing was
    evaluated."""
    if not tables or not tables[0].columns:
        return None
    main = next((column for column in tables[0].columns if column.kind == "quality"), None)
    here = [system for system in systems if system.task == tables[0].task]
    students = [s for s in here if s.role == "after" and main and is_number(s.metrics.get(main.name))]
    if main is None or not students:
        return None
    sign = -1 if main.better == "lower" else 1
    best = max(students, key=lambda system: sign * system.metrics[main.name])
    value = best.metrics[main.name]
    before, teacher = baseline(here, best), teacher_of(here, best)
    start = before.metrics.get(main.name) if before else None
    top = teacher.metrics.get(main.name) if teacher else None
    compared = f"{main.change(value, start)} against the student before" if is_number(start) else ""
    figures = [(main.show(value), main.label, compared)]
    if is_number(start) and is_number(top) and sign * (top - start) > 0:
        closed = (value - start) / (top - start)
        figures.append(
            (
                f"{closed:.0%}",
                "of the gap closed",
                f"from {main.show(start)} to the teacher's {main.show(top)}",
            )
        )
    figures += _ratios(best, teacher)
    return {"label": best.label, "several": len(students) > 1, "figures": figures, "colour": best.colour}


def _ratios(student: System, teacher: System | None) -> list[tuple[str, str, str]]:
    found = []
    for name, words in (("parameters", "smaller"), ("tokens_per_second", "faster")):
        own, other = student.metrics.get(name), teacher.metrics.get(name) if teacher else None
        if not is_number(own) or not is_number(other) or not own or not other:
            continue
        ratio = other / own if name == "parameters" else own / other
        if ratio >= 1.05:
            unit = "parameters" if name == "parameters" else "tokens/s"
            shown = measure(name)
            found.append((f"{ratio:.1f}×", words, f"{shown.show(own)} against {shown.show(other)} {unit}"))
    return found


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


def glossary(tables: Sequence[ResultTable]) -> list[tuple[str, str]]:
    """Each measure of the tables with what it means."""
    whole = [part for table in tables for part in (table, table.more) if part]
    seen = dict.fromkeys((column.label, column.about) for table in whole for column in table.columns)
    return [(label, about) for label, about in seen if about]


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


def plain(value: Any) -> str:
    """A setting as it would stand in YAML, on one line."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    try:
        text = yaml.safe_dump(
            value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
        )
    except yaml.YAMLError:
        return str(value)
    return text.strip()
