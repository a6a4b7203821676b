"""A table, and what a terminal, Markdown, LaTeX, CSV and JSON make of it.

Names in it may come from other people's folders: every form escapes them.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import rich.table
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.text import Text

from stillhouse.console.format import MISSING, number, visible
from stillhouse.console.text import output

ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A column. Example: `TableColumn("ROUGE-L", "rouge_l", numeric=True, better="higher")`"""

    heading: str
    name: str = ""
    """Its name in CSV and JSON."""
    numeric: bool = False
    """Set right, and never broken over lines."""
    better: Literal["higher", "lower"] | None = None
    """Which way is better, shown as an arrow in Markdown and LaTeX."""
    about: str = ""
    """What it means, in a sentence."""
    subheading: str = ""
    """A second line of the heading, which the page has room for."""


@dataclass(frozen=True, slots=True)
class TableCell:
    """A cell. Example: `TableCell(57.0531, "57.1", "± 0.3", best=True)`"""

    value: Any
    """The raw value, for CSV and JSON."""
    text: str
    spread: str = ""
    """How sure it is, behind the text."""
    best: bool = False
    """Shown bold."""


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows of finished cells."""

    columns: Sequence[TableColumn]
    rows: Sequence[Sequence[TableCell]]
    title: str = ""
    note: str = ""
    """A sentence below it."""

    def records(self) -> list[dict[str, Any]]:
        """One mapping of column names to raw values for each row."""
        names = [column.name for column in self.columns]
        return [dict(zip(names, (cell.value for cell in row), strict=True)) for row in self.rows]

    def csv(self) -> str:
        """Raw values below the names of the columns."""
        handle = io.StringIO()
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([_csv_cell(column.name) for column in self.columns])
        writer.writerows([_csv_cell(cell.value) for cell in row] for row in self.rows)
        return handle.getvalue()

    def markdown(self) -> str:
        """A table of GitHub's Markdown, with the title above and the note below."""
        headings, rows = self._escaped(_markdown, "**{}**")
        lines = [headings, ["--:" if column.numeric else "---" for column in self.columns], *rows]
        title = [f"**{_markdown(self.title)}**", ""] if self.title else []
        note = ["", _markdown(self.note)] if self.note else []
        return "\n".join([*title, *(f"| {' | '.join(line)} |" for line in lines), *note, ""])

    def latex(self) -> str:
        r"""A `table` for the package booktabs, with the title as its caption and the note below."""
        headings, rows = self._escaped(_latex, r"\textbf{{{}}}")
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                *([rf"\caption{{{_latex(self.title)}}}"] if self.title else []),
                rf"\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in self.columns)}}}",
                r"\toprule",
                " & ".join(headings) + r" \\",
                r"\midrule",
                *(" & ".join(row) + r" \\" for row in rows),
                r"\bottomrule",
                r"\end{tabular}",
                *([rf"\par\smallskip {{\footnotesize {_latex(self.note)}}}"] if self.note else []),
                r"\end{table}",
                "",
            ]
        )

    def _escaped(self, escape: Callable[[str], str], bold: str) -> tuple[list[str], list[list[str]]]:
        """Headings and cells as text of a markup language."""

        def cell_text(cell: TableCell) -> str:
            text = escape(cell.text)
            return f"{bold.format(text) if cell.best else text} {escape(cell.spread)}".rstrip()

        headings = [escape(column.heading + ARROWS[column.better]) for column in self.columns]
        return headings, [[cell_text(cell) for cell in row] for row in self.rows]

    def print(self, console: Console | None = None) -> None:
        """Print it so that no number is ever cut or broken, by default to standard output.

        Columns of numbers keep their width; text columns wrap on a narrow terminal. In a pipe the table is
        as wide as it needs to be.
        """
        console = console or output()
        drawn = self._drawn()
        needed = Measurement.get(console, console.options.update(width=100_000), drawn)
        width = needed.maximum
        if console.is_terminal:
            width = max(needed.minimum, min(width, console.width))
        wide = console.width
        console.width = max(width, wide)
        try:
            console.print(drawn, width=width, crop=False, overflow="ignore", no_wrap=True)
        finally:
            console.width = wide
        if self.note:
            console.print(Text(visible(self.note)), soft_wrap=True)

    def _drawn(self) -> rich.table.Table:
        drawn = rich.table.Table(
            title=Text(visible(self.title)) if self.title else None,
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title_justify="left",
        )
        for column in self.columns:
            drawn.add_column(
                Text(visible(column.heading)),
                justify="right" if column.numeric else "left",
                no_wrap=column.numeric,
                overflow="fold",
                vertical="top",
            )
        for row in self.rows:
            texts = [visible(f"{cell.text} {cell.spread}".rstrip()) for cell in row]
            bold = ["bold" if cell.best else "" for cell in row]
            drawn.add_row(*map(Text, texts, bold))
        return drawn


def make_table(
    headings: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", note: str = ""
) -> Table:
    """A table of plain values; a column is numeric if all its cells are numbers or begin like one."""
    cells = [[TableCell(value, number(value)) for value in row] for row in rows]
    columns = [
        TableColumn(heading, heading, numeric=all(_is_numeric(row[index]) for row in cells))
        for index, heading in enumerate(headings)
    ]
    return Table(columns, cells, title, note)


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str = "",
    note: str = "",
    console: Console | None = None,
) -> None:
    """Print a table of plain values, as `make_table` makes it."""
    make_table(headings, rows, title=title, note=note).print(console)


def _is_numeric(cell: TableCell) -> bool:
    """True for numbers, dashes and text that begins like a number, such as `57.1 ± 0.3`."""
    if cell.value is None or isinstance(cell.value, int | float):
        return True
    text = cell.text.strip().lstrip("+-−±×")
    return text[:1].isdigit() or text in ("", MISSING, "nan", "inf")


def _csv_cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\n") else text


def _markdown(text: str) -> str:
    safe = html.escape(" ".join(visible(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", safe)


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$", "·": r"$\cdot$", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "\u00a0": "~",
}  # fmt: skip


def _latex(text: str) -> str:
    """Text for LaTeX; letters that a plain pdflatex does not know stay, for it knows UTF-8."""
    return "".join(LATEX.get(letter, letter) for letter in " ".join(visible(text).split(" ")))
