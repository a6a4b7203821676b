"""The results as tables: all systems on each task, and all tasks at a glance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.console import Table, TableCell, TableColumn
from stillhouse.console.format import MISSING, compact_number, is_number, setting_text
from stillhouse.report.metrics import (
    PAIRED,
    MetricInfo,
    interval,
    main_metric,
    shown_metrics,
)
from stillhouse.report.ranking import best_students, differences_table
from stillhouse.report.systems import (
    OF_THE_MODEL,
    System,
    baseline,
    difference,
    differing_settings,
    measured_differently,
    teacher_of,
)

FIRST_COLUMN = TableColumn("System", "system")
PROMPTS = TableColumn("Prompts", "prompts", numeric=True, about="On how many prompts it was measured.")
LOPSIDED = 1.25
"""An interval whose one side is more than so many times as long as the other is given by its ends."""


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
    differences_by_prompt: Table | None
    """The students against the best one, prompt by prompt."""
    settings: list[tuple[str, str]]
    differences: tuple[str, ...]
    """In what the systems were not measured alike."""
    slow_drafts: tuple[str, ...] = ()
    """Which students make the teacher slower as its draft model, in words."""
    left_out: tuple[str, ...] = ()
    """How many rows of the set were not used, or cut, in words."""


def task_results(systems: Sequence[System]) -> list[TaskResults]:
    """The results of each task."""
    found = []
    for task in dict.fromkeys(system.task for system in systems):
        here = [system for system in systems if system.task == task]
        metrics = shown_metrics(system.metrics for system in here)
        different = tuple(measured_differently(here))
        slow = tuple(_slow_drafts(here))
        unlike = f"Not measured alike: {'; '.join(different)}." if different else ""
        left_out = tuple(_left_out(here))
        note = " ".join(filter(None, (*left_out, unlike, *slow)))
        table = _table(task, here, [metric for metric in metrics if metric.main], note)
        further = [metric for metric in metrics if not metric.main]
        more = _table(task, here, further) if further else None
        main = main_metric(system.metrics for system in here)
        apart = differences_table(main, here) if main is not None else None
        found.append(TaskResults(task, table, more, apart, _settings(here), different, slow, left_out))
    return found


def _table(task: str, systems: Sequence[System], metrics: list[MetricInfo], note: str = "") -> Table:
    best = {metric.name: best_students(metric, systems) for metric in metrics}
    main = main_metric(system.metrics for system in systems)
    barred = main.name if main is not None and main.better == "higher" else None
    counts = {system.prompts for system in systems}
    rows: list[list[TableCell]] = [
        [
            _system_cell(system),
            *([ResultCell(system.prompts, compact_number(system.prompts))] if len(counts) > 1 else []),
            *(_cell(metric, system, systems, best[metric.name], metric.name == barred) for metric in metrics),
        ]
        for system in systems
    ]
    columns = [
        FIRST_COLUMN,
        *([PROMPTS] if len(counts) > 1 else []),
        *(metric.column() for metric in metrics),
    ]
    notes = filter(None, (note, *_legend(rows)))
    return Table(columns, rows, _title(task, systems), " ".join(notes), drop_columns=True)


def _title(task: str, systems: Sequence[System]) -> str:
    """The task with its sample size, where all systems have the same."""
    counts = {system.prompts for system in systems}
    responses = {_responses_each(system) for system in systems}
    if len(counts) > 1 or None in counts:
        return task
    each = next(iter(responses)) if len(responses) == 1 else 1
    size = f"{next(iter(counts)):,} prompts" + (f", {each} responses each" if each > 1 else "")
    return f"{task} ({size})" if task else size


def _left_out(systems: Sequence[System]) -> list[str]:
    """How many rows of the set could not be used or were cut; by system where that differs."""
    found = {system.label: rows_left_out(system.settings) for system in systems}
    if len(set(found.values())) == 1:
        return [f"{text}." for text in dict.fromkeys(found.values()) if text]
    return [f"{label}: {text}." for label, text in found.items() if text]


def rows_left_out(settings: Mapping[str, Any]) -> str:
    """In words, how many rows of the set of a result were left out or cut; empty if all were taken whole.

    Example: "11 of 20 rows left out (11 prompt too long), 3 of 20 rows cut (response too long)"
    """
    dropped, cut = (
        {str(k): int(v) for k, v in (settings.get(name) or {}).items() if v}
        for name in ("dropped", "truncated")
    )
    rows = settings.get("rows")
    of = f" of {rows:,} rows" if is_number(rows) and rows else ""
    parts = []
    if dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        parts.append(f"{sum(dropped.values()):,}{of or ' rows'} left out ({reasons})")
    parts += [f"{count:,}{of} cut ({reason} too long)" for reason, count in cut.items()]
    return ", ".join(parts)


def _responses_each(system: System) -> int:
    seeds, samples = system.settings.get("seeds"), system.settings.get("samples")
    return (len(seeds) if isinstance(seeds, list) else 1) * (int(samples) if is_number(samples) else 1)


def _legend(rows: Sequence[Sequence[TableCell]]) -> list[str]:
    """What ± and bold say, where they occur."""
    cells = [cell for row in rows for cell in row]
    found = []
    if any(cell.spread and not cell.spread.endswith(SD) for cell in cells):
        found.append("±: 95% interval.")
    if any(cell.spread.endswith(SD) for cell in cells):
        found.append("± SD: standard deviation over seeds.")
    if any(cell.best for cell in cells):
        found.append("Bold: best, or not to be told apart from it.")
    return found


def _slow_drafts(systems: Sequence[System]) -> list[str]:
    """In words, which students make the teacher slower as its draft model."""
    found = [(s.label, s.metrics["speed_up"]) for s in systems if is_number(s.metrics.get("speed_up"))]
    return [
        f"As a draft model {label} makes the teacher slower: {ratio:.2f} times its own tokens per second."
        for label, ratio in found
        if ratio < 1
    ]


def _system_cell(system: System) -> SystemCell:
    return SystemCell(system.label, system.label, colour=system.colour)


def _cell(
    metric: MetricInfo,
    system: System,
    systems: Sequence[System],
    best: Sequence[System] = (),
    barred: bool = False,
) -> ResultCell:
    value = system.metrics.get(metric.name)
    if not is_number(value):
        return ResultCell(value, metric.show(value))
    change, improved = _change(metric, value, system, systems)
    return ResultCell(
        value,
        metric.show(value),
        spread(metric, system),
        any(one is system for one in best),
        change=change,
        improved=improved,
        bar=_bar(metric, system, systems) if barred else None,
    )


SD = " SD"
"""Stands behind a standard deviation, of which no interval is known."""


def spread(metric: MetricInfo, system: System) -> str:
    """`± 0.3`, half of the 95 % interval; the ends of a lopsided one; `± 0.3 SD` for a deviation over seeds
    where no interval is known."""
    value, reach = system.metrics.get(metric.name), interval(system.metrics, metric.name)
    if reach is None or not is_number(value):
        deviation = system.metrics.get(f"{metric.name}_std")
        known = is_number(deviation) and math.isfinite(deviation) and deviation > 0
        return f"± {metric.show(deviation)}{SD}" if known else ""
    below, above = value - reach[0], reach[1] - value
    if max(below, above) <= LOPSIDED * min(below, above):
        return f"± {metric.show((below + above) / 2)}"
    return f"({metric.show(reach[0])} to {metric.show(reach[1])})" if above > -below else ""


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
        teacher = comparable(system, teacher_of(systems, system))
        other = teacher.metrics.get(metric.name) if teacher else None
        if system.role == "teacher" or not is_number(other) or not other or not value:
            return "", None
        if metric.kind == "size":
            return (
                (f"{compact_number(round(other / value, 1))}× smaller", None) if value < other else ("", None)
            )
        return "", None  # two speeds of different times
    before = comparable(system, baseline(systems, system))
    if system.role != "after" or metric.kind != "quality" or before is None:
        return "", None
    return change_of(metric, system, before)


def change_of(metric: MetricInfo, system: System, before: System) -> tuple[str, bool | None]:
    """The change against another system, and whether it is for the better; None where the two cannot be told
    apart."""
    value, reference = system.metrics.get(metric.name), before.metrics.get(metric.name)
    if not is_number(value) or not is_number(reference):
        return "", None
    apart = difference(metric, system, before)
    sure = apart is not None and apart.told_apart
    return metric.change(value, reference), metric.improves(value, reference) if sure else None


def comparable(system: System, other: System | None) -> System | None:
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
    best = {task: best_students(main, by_task[task]) for task, main in known}
    rows: list[list[TableCell]] = []
    for who in dict.fromkeys(system.who for system in systems):
        own = {s.task: s for s in systems if s.who == who}
        cells = [
            replace(_cell(main, own[task], by_task[task], best[task]), change="", improved=None)
            if task in own
            else ResultCell(None, MISSING)
            for task, main in known
        ]
        rows.append([_system_cell(next(iter(own.values()))), *cells])
    columns = [
        replace(main.column(), heading=task, subheading=_sized(main.label, by_task[task]))
        for task, main in known
    ]
    return Table([FIRST_COLUMN, *columns], rows)


def _sized(label: str, systems: Sequence[System]) -> str:
    counts = {system.prompts for system in systems}
    return f"{label}, {next(iter(counts)):,} prompts" if len(counts) == 1 and None not in counts else label


def glossary(results: Sequence[TaskResults]) -> list[tuple[str, str]]:
    """Each metric of the tables with what it means."""
    tables = [table for one in results for table in (one.table, one.more) if table]
    seen = dict.fromkeys((column.heading, column.about) for table in tables for column in table.columns)
    return [(heading, about) for heading, about in seen if about]
