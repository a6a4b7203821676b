"""One reading of a dataset: what happens to rows that cannot be read, and an account of what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from stillhouse.data.formats import read_row
from stillhouse.data.formats.values import is_blank
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import DataError, RowError

BadRows = Literal["refuse", "drop"]

SHOWN_BAD_ROWS = 3
"""Dropped rows that are shown, of all."""

USED_FACTS = frozenset({
    "answer", "solution", "teacher", "accept",
    "entry_point", "test", "test_list", "test_setup_code", "code", "canonical_solution",
})  # fmt: skip
"""Facts of rows that grading, filters, tasks or objectives use."""

_IDENTIFIERS = ("id", "uid", "uuid", "idx", "index", "key", "hash")


class Reading:
    """How rows are read, and what was found in them.

    Example:
        >>> reading = Reading("drop", ignore=["category"])
        >>> prompts = [row.instruction for row in dataset.rows(reading)]
        >>> reading.dropped
        Counter({"not JSON": 2})
    """

    def __init__(
        self,
        bad_rows: BadRows = "refuse",
        ignore: Collection[str] = (),
        way_out: str = "",
        used: Collection[str] = (),
    ) -> None:
        """A reading that has not begun.

        Args:
            bad_rows: what happens to a row that cannot be read.
            ignore: fields that are read as if they were not there.
            way_out: what to do about such a row, for the message that refuses it.
            used: fields beside `USED_FACTS` that the run uses.
        """
        self.bad_rows = bad_rows
        self.ignore = tuple(ignore)
        self.folder = ""
        """The folder of the file that is being read: where paths in its rows begin."""
        self.rows = 0
        """Rows that were read, those that were dropped included."""
        self.unlabelled = 0
        self.dropped: Counter[str] = Counter()
        """Rows that could not be read, by reason."""
        self.first_dropped: list[str] = []
        """What is wrong with the first of them."""
        self.formats: Counter[str] = Counter()
        """Rows of each format."""
        self.format_fields: dict[str, tuple[str, ...]] = {}
        """The fields by which the first row of a format was recognised."""
        self.unused: Counter[str] = Counter()
        """Rows with text in a field that nothing uses, by field."""
        self.rows_by_part: Counter[int] = Counter()
        """Of several mixed datasets: rows of each."""
        self._way_out = way_out
        self._used = USED_FACTS | set(used)

    def drop(self, error: RowError) -> None:
        """Count a line or row that cannot be read.

        Raises:
            DataError: bad rows are refused.
        """
        self.drop_read(error, error.reason)
        self.rows += 1

    def drop_read(self, error: DataError, reason: str) -> None:
        """Count a row that was read and cannot be used.

        Raises:
            DataError: bad rows are refused.
        """
        if self.bad_rows == "refuse":
            told = "data.bad_rows" in str(error)
            raise DataError(str(error) if told else f"{error}. {self._way_out}".rstrip()) from error
        self.dropped[reason] += 1
        if len(self.first_dropped) < SHOWN_BAD_ROWS:
            self.first_dropped.append(str(error))

    def read(self, raw: Mapping[str, Any], fields: Fields, location: str) -> Row | None:
        """The row; None if it cannot be read and is dropped.

        Raises:
            DataError: bad rows are refused.
        """
        try:
            row = read_row(raw, fields, location, self.ignore)
        except RowError as error:
            self.drop(error)
            return None
        self.formats[row.format] += 1
        if row.format not in self.format_fields:
            self.format_fields[row.format] = tuple(name for name in raw if name not in row.extra)
        for name, value in row.extra.items():
            if isinstance(value, str) and not is_blank(value) and self._is_told(name):
                self.unused[name] += 1
        return self.placed(row)

    def placed(self, row: Row) -> Row:
        """The row, told where the paths of its images begin."""
        return replace(row, folder=self.folder) if row.image_values else row

    def _is_told(self, name: str) -> bool:
        return name not in self._used and name not in self.ignore and not _is_identifier(name)

    def report(self) -> dict[str, Any]:
        """For data.json: formats with the fields that tell them, fields that are not used, bad rows."""
        formats = {
            name: {"rows": count, "fields": list(self.format_fields[name])}
            for name, count in self.formats.items()
        }
        optional = {
            "unused_fields": dict(self.unused),
            "unused": self.unused_line(),
            "bad_rows": list(self.first_dropped),
        }
        return {"formats": formats, **{name: value for name, value in optional.items() if value}}

    def format_line(self) -> str:
        """Which formats the rows have and why, as one line."""
        return "; ".join(
            f"{count:,} rows read as {name} (fields {', '.join(self.format_fields[name])})"
            for name, count in self.formats.items()
        )

    def unused_line(self) -> str | None:
        """Which fields with text nothing uses, as one line."""
        if not self.unused:
            return None
        total = max(1, sum(self.formats.values()))
        named = ", ".join(
            f"{name!r} (text in {_percent(n, total)} of rows)" for name, n in self.unused.items()
        )
        fields, are = ("field", "is") if len(self.unused) == 1 else ("fields", "are")
        names = ", ".join(self.unused)
        return f"{fields} {named} {are} not used; data.ignore: [{names}] silences this"


def _is_identifier(name: str) -> bool:
    lower = name.lower()
    return lower in _IDENTIFIERS or lower.endswith("_id")


def _percent(count: int, total: int) -> str:
    share = 100 * count / total
    return f"{share:.0f} %" if share >= 1 or not count else f"{share:.2g} %"
