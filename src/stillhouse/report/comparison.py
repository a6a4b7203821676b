"""The comparison of runs as text: tables in the terminal, Markdown and LaTeX, raw values in CSV and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from stillhouse import console
from stillhouse.console import Table, TableCell, TableColumn
from stillhouse.console.format import is_number
from stillhouse.report.chains import stage_tables
from stillhouse.report.configuration import config_diff
from stillhouse.report.metrics import ENDS, shown_metrics
from stillhouse.report.record import RunRecord, trained
from stillhouse.report.results import task_results
from stillhouse.report.systems import System, gather


def comparison_tables(
    runs: Sequence[RunRecord], *, everything: bool = False, paired: bool = False
) -> list[Table]:
    """One table for each task; with `everything` the further metrics of a task follow as one of its own,
    with `paired` the students against the best one, prompt by prompt."""
    return [
        table
        for one in task_results(gather(runs))
        for table in (
            one.table,
            one.more if everything else None,
            one.differences_by_prompt if paired else None,
        )
        if table is not None
    ]


def print_comparison(runs: Sequence[RunRecord], *, everything: bool = False, paired: bool = False) -> None:
    """Print `comparison_tables`: for each task the best students bold, and what was not measured alike."""
    tables = comparison_tables(runs, everything=everything, paired=paired)
    for table in stage_tables(runs):
        replace(table, title=f"Stages of {table.title}").print()
    if not tables:
        console.note("No system of these runs has been evaluated yet.")
    for table in tables:
        table.print()


def comparison_text(
    runs: Sequence[RunRecord],
    form: Literal["csv", "json", "markdown", "latex"],
    *,
    everything: bool = False,
) -> str:
    """The comparison as text.

    Args:
        runs: what `load_runs` gave.
        form: csv and json hold raw values; latex needs the package booktabs.
        everything: in Markdown and LaTeX also the metrics that the first table of the page leaves out, and
            the students against the best one.
    """
    if form == "csv":
        return summary_table(runs).csv()
    if form == "json":
        return _json(runs)
    tables = comparison_tables(runs, everything=everything, paired=everything)
    return "\n".join(table.markdown() if form == "markdown" else table.latex() for table in tables)


def summary_table(runs: Sequence[RunRecord]) -> Table:
    """Raw values: one row for each system of each task, one column for each metric that any system has.

    A metric's 95 % interval stands in NAME_low and NAME_high, its standard deviation over seeds in NAME_std.
    "prompts" is the sample size; "run" has all runs of a system that stands for several seeds. "run",
    "recipe" and "state" are empty for a teacher or student before that all runs share.
    """
    systems = gather(runs)
    names = ["system", "task", "run", "recipe", "state", "prompts"]
    for metric in shown_metrics(system.metrics for system in systems):
        ends = [f"{metric.name}{end}" for end in ENDS]
        names += [metric.name, *(end for end in ends if any(is_number(s.metrics.get(end)) for s in systems))]
    columns = [TableColumn(name, name, numeric=index >= 5) for index, name in enumerate(names)]
    rows = []
    for system in systems:
        values = {**system.metrics, **_facts(system, runs)}
        rows.append([TableCell(values.get(name), console.number(values.get(name))) for name in names])
    return Table(columns, rows)


def _facts(system: System, runs: Sequence[RunRecord]) -> dict[str, Any]:
    facts = {"system": system.label, "task": system.task, "prompts": system.prompts}
    if system.run is not None:
        run = runs[system.run]
        names = [runs[one.run].name for one in system.members if one.run is not None] or [run.name]
        facts |= {"run": ", ".join(names), "recipe": run.recipe, "state": run.status}
    return facts


def _json(runs: Sequence[RunRecord]) -> str:
    """`{"systems": [...], "differences": {setting: [{run, value}]}, "measured_differently": {task: [text]},
    "paired": {task: [{system, difference, ...}]}}`; what is not finite becomes null."""
    compared = trained(runs)
    names = [run.name for run in compared]
    differences = {
        row.path: [{"run": name, "value": value} for name, value in zip(names, row.values, strict=True)]
        for row in config_diff(compared)
    }
    results = task_results(gather(runs))
    found = {
        "systems": summary_table(runs).records(),
        "differences": differences,
        "measured_differently": {one.task: list(one.differences) for one in results if one.differences},
        "paired": {
            one.task: one.differences_by_prompt.records() for one in results if one.differences_by_prompt
        },
    }
    return json.dumps(_finite(found), indent=2, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
