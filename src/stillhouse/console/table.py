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
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from stillhouse.console.format import MISSING, number, visible
from stillhouse.console.layout import EDGES, GAP, ColumnTexts, FittedColumn, fitted
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
    drop_columns: bool = False
    """What a terminal does that is too narrow: leave out columns from the right, or turn the table."""

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
        """Print it, by default to standard output, so that no name and no number is ever cut.

        In a pipe the table is as wide as it needs to be. On a terminal that is too narrow, text wraps; where
        that is not enough, columns are left out from the right and named below (`drop_columns`), or each row
        becomes a block of lines.
        """
        console = console or output()
        texts = self._texts()
        columns = [FittedColumn(n, c.width, c.heading) for n, c in enumerate(texts)]
        needed = EDGES + GAP * (len(columns) - 1) + sum(column.width for column in columns)
        room = console.width if console.is_terminal else needed
        shown = columns if needed <= room else fitted(texts, room, drop=self.drop_columns)
        if shown is None:
            self._print_turned(console, texts)
        else:
            self._print_drawn(console, shown)
        left_out = [column.heading for column in texts[len(shown or texts) :]]
        notes = [self.note]
        if left_out:
            more = f"{len(left_out)} more column{'s' * (len(left_out) > 1)}"
            notes.insert(0, f"{more} in a wider terminal or a pipe (| less -S): {', '.join(left_out)}.")
        for note in filter(None, notes):
            console.print(Text(visible(note)), soft_wrap=not console.is_terminal)

    def _texts(self) -> list[ColumnTexts]:
        rows = [[visible(f"{cell.text} {cell.spread}".rstrip()) for cell in row] for row in self.rows]
        return [
            ColumnTexts(visible(column.heading), tuple(row[n] for row in rows), column.numeric)
            for n, column in enumerate(self.columns)
        ]

    def _print_drawn(self, console: Console, columns: Sequence[FittedColumn]) -> None:
        drawn = rich.table.Table(
            title=Text(visible(self.title)) if self.title else None,
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title_justify="left",
        )
        for column in columns:
            numeric = self.columns[column.index].numeric
            drawn.add_column(
                Text(column.heading),
                justify="right" if numeric else "left",
                width=column.width,
                overflow="fold",
                vertical="top",
            )
        for row in self.rows:
            cells = [row[column.index] for column in columns]
            texts = [visible(f"{cell.text} {cell.spread}".rstrip()) for cell in cells]
            drawn.add_row(*map(Text, texts, ["bold" if cell.best else "" for cell in cells]))
        wide = console.width
        console.width = max(wide, EDGES + GAP * len(columns) + sum(column.width for column in columns))
        try:
            console.print(drawn, crop=False, overflow="ignore", no_wrap=True)
        finally:
            console.width = wide

    def _print_turned(self, console: Console, texts: Sequence[ColumnTexts]) -> None:
        """Each row as a block: the name, and below it a line for every other column."""
        if self.title:
            console.print(Text(visible(self.title), "italic"))
        headings = [column.heading for column in texts[1:]]
        width = min(max(map(cell_len, headings), default=0) + 2, console.width // 2)
        for n, row in enumerate(self.rows):
            console.print(Text(texts[0].cells[n], "bold"), overflow="fold")
            block = rich.table.Table.grid(padding=(0, 2))
            block.add_column(width=width, overflow="fold")
            block.add_column(overflow="fold")
            for heading, column, cell in zip(headings, texts[1:], row[1:], strict=True):
                block.add_row(Text(f"  {heading}"), Text(column.cells[n], "bold" if cell.best else ""))
            console.print(block)


def make_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str = "",
    note: str = "",
    drop_columns: bool = False,
) -> Table:
    """A table of plain values; a column is numeric if all its cells are numbers or begin like one."""
    cells = [[TableCell(value, number(value)) for value in row] for row in rows]
    columns = [
        TableColumn(heading, heading, numeric=all(_is_numeric(row[index]) for row in cells))
        for index, heading in enumerate(headings)
    ]
    return Table(columns, cells, title, note, drop_columns)


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
