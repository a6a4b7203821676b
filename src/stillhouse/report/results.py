"""The results as tables: all systems on each task, all tasks at a glance, the best student in figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.console import Table, TableCell, TableColumn
from stillhouse.console.format import MISSING, compact_number, is_number, setting_text
from stillhouse.report.metrics import (
    PAIRED,
    MetricInfo,
    interval,
    main_metric,
    metric_info,
    shown_metrics,
)
from stillhouse.report.systems import (
    OF_THE_MODEL,
    System,
    baseline,
    differing_settings,
    measured_differently,
    teacher_of,
)

SE = " SE"
"""Stands behind a standard error."""
FIRST_COLUMN = TableColumn("System", "system")


@dataclass(frozen=True, slots=True)
class ValueBar:
    """A value as a part of the widest one of its column, with the reach of its spread; all from 0 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ResultCell(TableCell):
    """One number, with its change, and a bar in the column that counts: the page shows these too."""

    change: str = ""
    """Against the student before; of size and speed, against the teacher."""
    improved: bool | None = None
    """Whether the change is one for the better; None where neither way is."""
    bar: ValueBar | None = None


@dataclass(frozen=True, slots=True)
class SystemCell(TableCell):
    """The name of a system, with the CSS variable that paints it."""

    colour: str = ""


@dataclass(frozen=True, slots=True)
class TaskResults:
    """All systems on one task."""

    task: str
    """Empty where it needs no mention."""
    table: Table
    """The main metrics; its note says in what the systems were not measured alike."""
    more: Table | None
    """The other metrics, if there are any."""
    settings: list[tuple[str, str]]
    differences: tuple[str, ...]
    """In what the systems were not measured alike."""


def task_results(systems: Sequence[System]) -> list[TaskResults]:
    """The results of each task."""
    found = []
    for task in dict.fromkeys(system.task for system in systems):
        here = [system for system in systems if system.task == task]
        metrics = shown_metrics(system.metrics for system in here)
        different = tuple(measured_differently(here))
        note = f"Not measured alike: {'; '.join(different)}." if different else ""
        table = _table(task, here, [metric for metric in metrics if metric.main], note)
        further = [metric for metric in metrics if not metric.main]
        more = _table(task, here, further) if further else None
        found.append(TaskResults(task, table, more, _settings(here), different))
    return found


def _table(task: str, systems: Sequence[System], metrics: list[MetricInfo], note: str = "") -> Table:
    best = {metric.name: _best(metric, systems) for metric in metrics}
    main = main_metric(system.metrics for system in systems)
    barred = main.name if main is not None and main.better == "higher" else None
    rows = [
        [
            _system_cell(system),
            *(_cell(metric, system, systems, best[metric.name], metric.name == barred) for metric in metrics),
        ]
        for system in systems
    ]
    return Table([FIRST_COLUMN, *(metric.column() for metric in metrics)], rows, task, note)


def _system_cell(system: System) -> SystemCell:
    return SystemCell(system.label, system.label, colour=system.colour)


def _best(metric: MetricInfo, systems: Sequence[System]) -> float | None:
    """The best value among several trained students; None where there is nothing to choose, or where they
    were not measured alike."""
    students = [s for s in systems if s.role == "after" and is_number(s.metrics.get(metric.name))]
    values = [s.metrics[metric.name] for s in students]
    ranked = metric.kind == "quality" and metric.better is not None
    if not ranked or len(set(values)) < 2 or measured_differently(students):
        return None
    return max(values) if metric.better == "higher" else min(values)


def _cell(
    metric: MetricInfo, system: System, systems: Sequence[System], best: float | None, barred: bool = False
) -> ResultCell:
    value = system.metrics.get(metric.name)
    if not is_number(value):
        return ResultCell(value, metric.show(value))
    change, improved = _change(metric, value, system, systems)
    return ResultCell(
        value,
        metric.show(value),
        _spread(metric, system),
        best is not None and value == best,
        change=change,
        improved=improved,
        bar=_bar(metric, system, systems) if barred else None,
    )


def _spread(metric: MetricInfo, system: System) -> str:
    """`± 0.3` for a standard deviation, `± 0.3 SE` for a standard error, or the ends of an interval."""
    reach = interval(system.metrics, metric.name)
    if reach is None:
        return ""
    if f"{metric.name}_low" in system.metrics:
        return f"({metric.show(reach[0])} to {metric.show(reach[1])})"
    if f"{metric.name}_std" in system.metrics:
        return f"± {metric.show(system.metrics[f'{metric.name}_std'])}"
    return f"± {metric.show(system.metrics[f'{metric.name}_se'])}{SE}"


def _bar(metric: MetricInfo, system: System, systems: Sequence[System]) -> ValueBar | None:
    """Beside the widest of all systems, its spread included."""

    def reach(one: System) -> tuple[float, float, float]:
        value = one.metrics.get(metric.name)
        known = float(value) if is_number(value) and math.isfinite(value) else 0.0
        low, high = interval(one.metrics, metric.name) or (known, known)
        return known, low, high

    most = max(high for _, _, high in map(reach, systems))
    value, low, high = reach(system)
    if most <= 0 or value < 0:
        return None
    return ValueBar(value / most, max(0.0, low) / most, high / most)


def _change(
    metric: MetricInfo, value: float, system: System, systems: Sequence[System]
) -> tuple[str, bool | None]:
    """Quality against the student before; size and speed against the teacher."""
    paired = system.metrics.get(PAIRED.get(metric.name, ""))
    if is_number(paired) and paired > 0:
        ratio = 1 / paired if metric.better == "lower" else paired
        return f"{compact_number(round(ratio, 2))}× the teacher", None
    if metric.kind in ("size", "speed"):
        teacher = _comparable(system, teacher_of(systems, system))
        other = teacher.metrics.get(metric.name) if teacher else None
        if system.role == "teacher" or not is_number(other) or not other or not value:
            return "", None
        if metric.kind == "size":
            return (
                (f"{compact_number(round(other / value, 1))}× smaller", None) if value < other else ("", None)
            )
        return f"{compact_number(round(value / other, 1))}× the teacher", None
    before = _comparable(system, baseline(systems, system))
    reference = before.metrics.get(metric.name) if before else None
    if system.role != "after" or metric.kind != "quality" or not is_number(reference):
        return "", None
    return metric.change(value, reference), metric.improves(value, reference)


def _comparable(system: System, other: System | None) -> System | None:
    """The other one, if it may be compared with `system`."""
    return None if other is None or differing_settings(other, system, OF_THE_MODEL) else other


def _settings(systems: Sequence[System]) -> list[tuple[str, str]]:
    """How a task was measured; where systems differ, what each of them had."""
    names = dict.fromkeys(name for system in systems for name in system.settings)
    found = []
    for name in names:
        values = {system.label: setting_text(system.settings.get(name)) for system in systems}
        same = len(set(values.values())) == 1
        text = (
            next(iter(values.values()))
            if same
            else "; ".join(f"{who}: {value}" for who, value in values.items())
        )
        found.append((name.replace("_", " ").capitalize(), text))
    return found


def overview(systems: Sequence[System]) -> Table | None:
    """The metric that counts of each task, for all systems; None where there is a single task."""
    tasks = list(dict.fromkeys(system.task for system in systems))
    by_task = {task: [system for system in systems if system.task == task] for task in tasks}
    found = ((task, main_metric(system.metrics for system in here)) for task, here in by_task.items())
    known = [(task, main) for task, main in found if main is not None]
    if len(known) < 2:
        return None
    best = {task: _best(main, by_task[task]) for task, main in known}
    rows: list[list[TableCell]] = []
    for who in dict.fromkeys((system.role, system.run, system.label) for system in systems):
        own = {s.task: s for s in systems if (s.role, s.run, s.label) == who}
        cells = [
            replace(_cell(main, own[task], by_task[task], best[task]), change="", improved=None)
            if task in own
            else ResultCell(None, MISSING)
            for task, main in known
        ]
        rows.append([_system_cell(next(iter(own.values()))), *cells])
    columns = [replace(main.column(), heading=task, subheading=main.label) for task, main in known]
    return Table([FIRST_COLUMN, *columns], rows)


def headline(systems: Sequence[System], results: Sequence[TaskResults]) -> dict[str, Any] | None:
    """The best trained student of the first task in three or four figures; None where nothing was
    evaluated, or where the students were not measured alike."""
    if not results or len(results[0].table.columns) == 1:
        return None
    here = [system for system in systems if system.task == results[0].task]
    main = main_metric(system.metrics for system in here)
    students = [s for s in here if s.role == "after" and main and is_number(s.metrics.get(main.name))]
    if main is None or not students or measured_differently(students):
        return None
    sign = -1 if main.better == "lower" else 1
    best = max(students, key=lambda system: sign * system.metrics[main.name])
    value = best.metrics[main.name]
    before, teacher = _comparable(best, baseline(here, best)), _comparable(best, teacher_of(here, best))
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
        size = metric_info("parameters")
        shown = f"{size.show(own)} against {size.show(other)} parameters"
        found.append((f"{other / own:.1f}×", "smaller", shown))
    same = (s for s in systems if (s.role, s.run, s.label) == (student.role, student.run, student.label))
    ratio = next(
        (s.metrics["decode_speed_up"] for s in same if is_number(s.metrics.get("decode_speed_up"))), 0
    )
    detail = "decoding, the two timed in turns"
    own, other = _of_both("tokens_per_second", student, teacher)
    if not ratio and own and other:
        speed = metric_info("tokens_per_second")
        ratio, detail = own / other, f"{speed.show(own)} against {speed.show(other)} tokens/s"
    return [*found, (f"{ratio:.1f}×", "faster", detail)] if ratio >= 1.05 else found


def _of_both(name: str, student: System, teacher: System | None) -> tuple[float, float]:
    values = (student.metrics.get(name), teacher.metrics.get(name) if teacher else None)
    own, other = (float(value) if is_number(value) else 0.0 for value in values)
    return own, other


def standard_errors(results: Sequence[TaskResults]) -> bool:
    """Whether some spread in the first tables is a standard error rather than a deviation."""
    return any(cell.spread.endswith(SE) for one in results for row in one.table.rows for cell in row)


def glossary(results: Sequence[TaskResults]) -> list[tuple[str, str]]:
    """Each metric of the tables with what it means."""
    tables = [table for one in results for table in (one.table, one.more) if table]
    seen = dict.fromkeys((column.heading, column.about) for table in tables for column in table.columns)
    return [(heading, about) for heading, about in seen if about]
