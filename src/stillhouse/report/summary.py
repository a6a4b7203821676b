"""The comparison of runs as rows: for the terminal, CSV or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.report.measures import ENDS, columns, is_number, measure
from stillhouse.report.record import RunRecord, find_runs, load_run
from stillhouse.report.systems import gather

LEADING = ("system", "task", "run", "recipe", "state")


def summary_table(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """One row for each system of each task, with raw values under the metrics' names.

    The keys are "system", "task", "run", "recipe", "state" and every metric that any system has; None where
    a system has no such value. "run", "recipe" and "state" are None for a teacher or student before that all
    runs share.

    Raises:
        DataError: a folder does not exist or holds no run.
    """
    return summary_rows([load_run(folder, answers=False) for folder in find_runs(folders)])


def summary_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """`summary_table` over runs that have been read."""
    systems = gather(runs)
    names = [column.name for column in columns(system.metrics for system in systems)]
    rows = []
    for system in systems:
        run = runs[system.run] if system.run is not None else None
        row: dict[str, Any] = {
            "system": system.label,
            "task": system.task,
            "run": run.name if run else None,
            "recipe": run.recipe if run else None,
            "state": run.status if run else None,
        }
        for name in names:
            row[name] = system.metrics.get(name)
            ends = (f"{name}{end}" for end in ENDS)
            row |= {end: system.metrics[end] for end in ends if is_number(system.metrics.get(end))}
        rows.append(row)
    return rows


def summary_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and formatted cells of the main measures, for `console.table`; a single task has no column."""
    values = ({name: value for name, value in row.items() if name not in LEADING} for row in rows)
    named = [column for column in columns(values) if column.main]
    several_tasks = len({row["task"] for row in rows}) > 1
    headings = ["system"] + ["task"] * several_tasks + [column.label for column in named]
    cells = []
    for row in rows:
        line = [str(row["system"])] + [str(row["task"])] * several_tasks
        for column in named:
            text = measure(column.name).show(row.get(column.name))
            spread = row.get(f"{column.name}_std")
            line.append(f"{text} ± {column.show(spread)}" if is_number(spread) and spread > 0 else text)
        cells.append(line)
    return headings, cells
