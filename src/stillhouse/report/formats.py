"""The comparison of runs as text: CSV and JSON with raw values, Markdown and LaTeX to read.

Names come from run folders that may be other people's; every format escapes them.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.report.measures import Measure
from stillhouse.report.record import RunRecord, find_runs, load_run
from stillhouse.report.results import Cell, ResultTable, result_tables
from stillhouse.report.sections import config_diff
from stillhouse.report.summary import LEADING, summary_rows
from stillhouse.report.systems import gather

ARROWS = {"higher": "↑", "lower": "↓", None: ""}


def load_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in the folders, without what the systems answered.

    Raises:
        DataError: a folder does not exist or holds no run.
    """
    return [load_run(folder, answers=False) for folder in find_runs(folders)]


def compared(runs: Sequence[RunRecord], kind: str, *, everything: bool = False) -> str:
    """The comparison as text.

    Args:
        runs: what `load_runs` gave.
        kind: "csv", "json", "markdown" or "latex".
        everything: in Markdown and LaTeX also the measures that the first table of the page leaves out.
    """
    if kind == "csv":
        return as_csv(summary_rows(runs))
    if kind == "json":
        return as_json(runs)
    tables = comparison_tables(runs, everything=everything)
    write = {"markdown": as_markdown, "latex": as_latex}[kind]
    return "\n".join(write(table) for table in tables)


def comparison_tables(runs: Sequence[RunRecord], *, everything: bool = False) -> list[ResultTable]:
    """One table for each task; with `everything` the further measures of a task follow as one of its own."""
    tables = result_tables(gather(runs))
    return [
        part for table in tables for part in (table, table.more if everything else None) if part is not None
    ]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Raw values with a heading; a measure's standard deviation stands in NAME_std."""
    names = list(dict.fromkeys(name for row in rows for name in row)) or list(LEADING)
    handle = io.StringIO()
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow([_csv_cell(name) for name in names])
    writer.writerows([_csv_cell(row.get(name)) for name in names] for row in rows)
    return handle.getvalue()


def _csv_cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = console.visible(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\n") else text


def as_json(runs: Sequence[RunRecord]) -> str:
    """`{"systems": [...], "differences": {setting: [{run, value}]}, "unlike": {task: [text]}}`; what is not
    finite becomes null."""
    names = [run.name for run in runs]
    differences = {
        row.path: [{"run": name, "value": value} for name, value in zip(names, row.values, strict=True)]
        for row in config_diff(runs)
    }
    unlike = {table.task: list(table.unlike) for table in comparison_tables(runs) if table.unlike}
    found = {"systems": summary_rows(runs), "differences": differences, "unlike": unlike}
    return json.dumps(_finite(found), indent=2, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_markdown(table: ResultTable) -> str:
    """A table of GitHub's Markdown with the task above it; the best of several students is bold."""

    def shown(cell: Cell) -> str:
        text = _markdown(cell.text)
        text = f"**{text}**" if cell.best else text
        return f"{text} {_markdown(cell.spread)}".rstrip()

    lines = [_row(["system", *(_heading(column, _markdown) for column in table.columns)])]
    lines.append(_row(["---", *("--:" for _ in table.columns)]))
    lines += [_row([_markdown(system.label), *map(shown, cells)]) for system, cells in table.rows]
    title = [f"**{_markdown(table.task)}**", ""] if table.task else []
    note = ["", _markdown(table.unlike_text)] if table.unlike else []
    return "\n".join([*title, *lines, *note, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    safe = html.escape(" ".join(console.visible(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", safe)


def as_latex(table: ResultTable) -> str:
    """A table for the package booktabs; the best of several students is bold."""

    def shown(cell: Cell) -> str:
        text = _latex(cell.text)
        text = rf"\textbf{{{text}}}" if cell.best else text
        return f"{text} {_latex(cell.spread)}".rstrip()

    headings = ["System", *(_heading(column, _latex) for column in table.columns)]
    rows = [[_latex(system.label), *map(shown, cells)] for system, cells in table.rows]
    body = [" & ".join(row) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            *([rf"\caption{{{_latex(table.task)}}}"] if table.task else []),
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(headings) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par\smallskip {{\footnotesize {_latex(table.unlike_text)}}}"] if table.unlike else []),
            r"\end{table}",
            "",
        ]
    )


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$", "·": r"$\cdot$", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "\u00a0": "~",
}  # fmt: skip


def _latex(text: str) -> str:
    """Text for LaTeX; letters that a plain pdflatex does not know stay, for it knows UTF-8."""
    return "".join(LATEX.get(letter, letter) for letter in " ".join(console.visible(text).split(" ")))


def _heading(column: Measure, escaped: Callable[[str], str]) -> str:
    arrow = ARROWS[column.better if column.kind == "quality" else None]
    return escaped(f"{column.label} {arrow}".rstrip())
