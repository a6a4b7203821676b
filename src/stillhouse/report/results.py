"""The results as tables: all systems on each task, all tasks at a glance, the best student in figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.report.likeness import OF_THE_MODEL, differences, unlike
from stillhouse.report.measures import (
    PAIRED,
    Measure,
    columns,
    compact,
    interval,
    is_number,
    main_measure,
    measure,
    plain,
)
from stillhouse.report.systems import System, baseline, teacher_of

SE = " SE"
"""Stands behind a standard error."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A value as a part of the widest one, with the reach of its standard deviation; all from 0 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the results table, with its spread, its change, and a bar in the column that counts."""

    text: str
    spread: str = ""
    note: str = ""
    good: bool | None = None
    best: bool = False
    bar: Bar | None = None


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
    unlike: tuple[str, ...] = ()
    """In what the systems were not measured alike."""

    @property
    def unlike_text(self) -> str:
        """The same as a sentence; empty where they were."""
        return f"Not measured alike: {'; '.join(self.unlike)}." if self.unlike else ""


def result_tables(systems: Sequence[System]) -> list[ResultTable]:
    """One table for each task."""
    tables = []
    for task in dict.fromkeys(system.task for system in systems):
        here = [system for system in systems if system.task == task]
        known = columns(system.metrics for system in here)
        more = _table(task, here, [column for column in known if not column.main])
        first = _table(task, here, [column for column in known if column.main])
        found = tuple(differences(here))
        tables.append(replace(first, more=more if more.columns else None, unlike=found))
    return tables


def _table(task: str, systems: Sequence[System], shown: list[Measure]) -> ResultTable:
    best = {column.name: _best(column, systems) for column in shown}
    main = main_measure(system.metrics for system in systems)
    barred = main.name if main is not None and main.better == "higher" else None
    rows = [
        (one, [_cell(column, one, systems, best[column.name], column.name == barred) for column in shown])
        for one in systems
    ]
    return ResultTable(task, shown, rows, _settings(systems))


def _best(column: Measure, systems: Sequence[System]) -> float | None:
    """The best value among several trained students; None where there is nothing to choose, or where they
    were not measured alike."""
    students = [s for s in systems if s.role == "after" and is_number(s.metrics.get(column.name))]
    values = [s.metrics[column.name] for s in students]
    if column.kind != "quality" or column.better is None or len(set(values)) < 2 or differences(students):
        return None
    return max(values) if column.better == "higher" else min(values)


def _cell(
    column: Measure, system: System, systems: Sequence[System], best: float | None, barred: bool
) -> Cell:
    value = system.metrics.get(column.name)
    if not is_number(value):
        return Cell(column.show(value))
    note, good = _change(column, value, system, systems)
    bar = _bar(column, system, systems) if barred else None
    shown_spread = _spread(column, system)
    return Cell(column.show(value), shown_spread, note, good, best is not None and value == best, bar)


def _spread(column: Measure, system: System) -> str:
    """`± 0.3` for a standard deviation, `± 0.3 SE` for a standard error, or the ends of an interval."""
    reach = interval(system.metrics, column.name)
    if reach is None:
        return ""
    if f"{column.name}_low" in system.metrics:
        return f"({column.show(reach[0])} to {column.show(reach[1])})"
    if f"{column.name}_std" in system.metrics:
        return f"± {column.show(system.metrics[f'{column.name}_std'])}"
    return f"± {column.show(system.metrics[f'{column.name}_se'])}{SE}"


def _bar(column: Measure, system: System, systems: Sequence[System]) -> Bar | None:
    """Beside the widest of all systems, its spread included."""

    def reach(one: System) -> tuple[float, float, float]:
        value = one.metrics.get(column.name)
        known = float(value) if is_number(value) and math.isfinite(value) else 0.0
        low, high = interval(one.metrics, column.name) or (known, known)
        return known, low, high

    most = max(high for _, _, high in map(reach, systems))
    value, low, high = reach(system)
    if most <= 0 or value < 0:
        return None
    return Bar(value / most, max(0.0, low) / most, high / most)


def _change(
    column: Measure, value: float, system: System, systems: Sequence[System]
) -> tuple[str, bool | None]:
    """Quality against the student before; size and speed against the teacher."""
    paired = system.metrics.get(PAIRED.get(column.name, ""))
    if is_number(paired) and paired > 0:
        ratio = 1 / paired if column.better == "lower" else paired
        return f"{compact(round(ratio, 2))}× the teacher", None
    if column.kind in ("size", "speed"):
        teacher = _alike(system, teacher_of(systems, system))
        other = teacher.metrics.get(column.name) if teacher else None
        if system.role == "teacher" or not is_number(other) or not other or not value:
            return "", None
        if column.kind == "size":
            return (f"{compact(round(other / value, 1))}× smaller", None) if value < other else ("", None)
        return f"{compact(round(value / other, 1))}× the teacher", None
    before = _alike(system, baseline(systems, system))
    reference = before.metrics.get(column.name) if before else None
    if system.role != "after" or column.kind != "quality" or not is_number(reference):
        return "", None
    return column.change(value, reference), column.improves(value, reference)


def _alike(system: System, other: System | None) -> System | None:
    """The other one, if it may be compared with `system`."""
    return None if other is None or unlike(other, system, OF_THE_MODEL) else other


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


@dataclass(frozen=True, slots=True)
class Overview:
    """Every system on every task, one number each."""

    tasks: list[tuple[str, str]]
    """Task and the label of its measure."""
    rows: list[tuple[System, list[Cell]]]


def overview(systems: Sequence[System]) -> Overview | None:
    """The measure that counts of each task, for all systems; None where there is a single task."""
    tasks = list(dict.fromkeys(system.task for system in systems))
    by_task = {task: [system for system in systems if system.task == task] for task in tasks}
    found = ((task, main_measure(system.metrics for system in here)) for task, here in by_task.items())
    known = [(task, main) for task, main in found if main is not None]
    if len(known) < 2:
        return None
    best = {task: _best(main, by_task[task]) for task, main in known}
    rows = []
    for who in dict.fromkeys((system.role, system.run, system.label) for system in systems):
        own = {s.task: s for s in systems if (s.role, s.run, s.label) == who}
        cells = [
            replace(_cell(main, own[task], by_task[task], best[task], barred=False), note="", good=None)
            if task in own
            else Cell("–")
            for task, main in known
        ]
        rows.append((next(iter(own.values())), cells))
    return Overview([(task, main.label) for task, main in known], rows)


def headline(systems: Sequence[System], tables: Sequence[ResultTable]) -> dict[str, Any] | None:
    """The best trained student of the first task in three or four figures; None where nothing was
    evaluated, or where the students were not measured alike."""
    if not tables or not tables[0].columns:
        return None
    here = [system for system in systems if system.task == tables[0].task]
    main = main_measure(system.metrics for system in here)
    students = [s for s in here if s.role == "after" and main and is_number(s.metrics.get(main.name))]
    if main is None or not students or differences(students):
        return None
    sign = -1 if main.better == "lower" else 1
    best = max(students, key=lambda system: sign * system.metrics[main.name])
    value = best.metrics[main.name]
    before, teacher = _alike(best, baseline(here, best)), _alike(best, teacher_of(here, best))
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
    figures += _ratios(best, teacher, systems)
    return {"label": best.label, "several": len(students) > 1, "figures": figures, "colour": best.colour}


def _ratios(student: System, teacher: System | None, systems: Sequence[System]) -> list[tuple[str, str, str]]:
    """How much smaller and faster than the teacher; by the task `cost`, where that was measured."""
    found = []
    own, other = _of_both("parameters", student, teacher)
    if own and other and other / own >= 1.05:
        size = measure("parameters")
        shown = f"{size.show(own)} against {size.show(other)} parameters"
        found.append((f"{other / own:.1f}×", "smaller", shown))
    same = (s for s in systems if (s.role, s.run, s.label) == (student.role, student.run, student.label))
    ratio = next(
        (s.metrics["decode_speed_up"] for s in same if is_number(s.metrics.get("decode_speed_up"))), 0
    )
    told = "writing, the two timed in turns"
    own, other = _of_both("tokens_per_second", student, teacher)
    if not ratio and own and other:
        speed = measure("tokens_per_second")
        ratio, told = own / other, f"{speed.show(own)} against {speed.show(other)} tokens/s"
    return [*found, (f"{ratio:.1f}×", "faster", told)] if ratio >= 1.05 else found


def _of_both(name: str, student: System, teacher: System | None) -> tuple[float, float]:
    values = (student.metrics.get(name), teacher.metrics.get(name) if teacher else None)
    own, other = (float(value) if is_number(value) else 0.0 for value in values)
    return own, other


def standard_errors(tables: Sequence[ResultTable]) -> bool:
    """Whether some spread in the first tables is a standard error rather than a deviation."""
    return any(cell.spread.endswith(SE) for table in tables for _, cells in table.rows for cell in cells)


def glossary(tables: Sequence[ResultTable]) -> list[tuple[str, str]]:
    """Each measure of the tables with what it means."""
    whole = [part for table in tables for part in (table, table.more) if part]
    seen = dict.fromkeys((column.label, column.about) for table in whole for column in table.columns)
    return [(label, about) for label, about in seen if about]
