"""How a table fits into a terminal: which columns stay, how wide each is, or that it has to be turned.

A name is never cut. Columns of numbers are never broken; those on the right go first. Text wraps.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

GAP = 3
"""Between two columns."""
EDGES = 2
NARROWEST_TEXT = 16
"""A column of text that wraps is at least so wide, unless all of it is shorter."""


@dataclass(frozen=True, slots=True)
class ColumnTexts:
    """A column as text, with control characters made visible."""

    heading: str
    cells: tuple[str, ...]
    numeric: bool

    @property
    def content(self) -> int:
        """The width of the widest line of a cell."""
        return max((cell_len(line) for cell in self.cells for line in cell.split("\n")), default=0)

    @property
    def width(self) -> int:
        """The width that it needs unbroken."""
        return max(self.content, cell_len(self.heading))


@dataclass(frozen=True, slots=True)
class FittedColumn:
    """A column that is shown. Example: `FittedColumn(1, 10, "Top-1\\nagreement")`"""

    index: int
    width: int
    heading: str


def fitted(columns: Sequence[ColumnTexts], width: int, *, drop: bool) -> list[FittedColumn] | None:
    """The columns that a terminal has room for.

    Args:
        columns: the first one has the names.
        width: of the terminal.
        drop: leave out columns from the right, but for the second one, until the rest fits.

    Returns:
        None where the table has to be turned.
    """
    for count in range(len(columns), 1 if drop else len(columns) - 1, -1):
        for broken in (False, True):
            found = _widths(columns[:count], width, broken)
            if found is not None:
                return found
    return None


def _widths(columns: Sequence[ColumnTexts], width: int, broken: bool) -> list[FittedColumn] | None:
    """The columns with their widths; with `broken`, headings of numbers take several lines."""
    headings = [_broken(c) if broken and c.numeric else c.heading for c in columns]
    wanted = [
        max(c.content, *(cell_len(line) for line in heading.split("\n")))
        for c, heading in zip(columns, headings, strict=True)
    ]
    room = width - EDGES - GAP * (len(columns) - 1)
    flexible = [n for n, c in enumerate(columns) if n and not c.numeric]
    fixed = sum(wanted[n] for n in range(len(columns)) if n not in flexible)
    least = sum(min(wanted[n], NARROWEST_TEXT) for n in flexible)
    if fixed + least > room:
        return None
    left = room - fixed
    # The narrow ones first: what they do not need is for the others.
    for place, n in enumerate(sorted(flexible, key=lambda n: wanted[n])):
        wanted[n] = min(wanted[n], left // (len(flexible) - place))
        left -= wanted[n]
    return [FittedColumn(n, wanted[n], headings[n]) for n in range(len(columns))]


def _broken(column: ColumnTexts) -> str:
    longest = max((cell_len(word) for word in column.heading.split()), default=1)
    return "\n".join(textwrap.wrap(column.heading, max(column.content, longest), break_long_words=False))
