"""Which teacher a row of the data set is for, told by one of its columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pydantic import Field

from stillhouse.config import StrictConfig
from stillhouse.core.types import Prompt
from stillhouse.errors import RowError

COLUMN = "teacher"
"""The column in which a row names its teacher itself."""


class RowTeacher(StrictConfig):
    """A column's value decides which teacher a row is for, as if the row named it in a column `teacher`.

    Example: `row_teacher: {column: domain, teachers: {maths: main, code: coder}, otherwise: main}`
    """

    column: str = "domain"
    """The column that is looked at, such as domain or source."""
    teachers: dict[str, str] = Field(min_length=1)
    """The name of the teacher for each value of the column; `main` is the one under `teacher`."""
    otherwise: str | None = None
    """The teacher of rows with another value, or without the column; None: such a row cannot be used, and
    `data.bad_rows` says what happens to it."""

    @property
    def names(self) -> frozenset[str]:
        """The teachers that rows may be given to."""
        return frozenset({*self.teachers.values(), *((self.otherwise,) if self.otherwise else ())})

    def named(self, prompt: Prompt, location: str) -> Prompt:
        """The prompt with its teacher among its facts.

        Raises:
            RowError: its value belongs to no teacher.
        """
        value = prompt.facts.get(self.column)
        name = self.teachers.get(str(value), self.otherwise)
        if name is not None:
            return replace(prompt, facts={**prompt.facts, COLUMN: name})
        got = f"no {self.column}" if value is None else f"{self.column} {value!r}"
        raise RowError(
            location,
            f"has {got}, which data.row_teacher gives to no teacher (it has {', '.join(self.teachers)}); "
            "add it, or set data.row_teacher.otherwise",
            f"no teacher for its {self.column}",
        )


def rows_by_teacher(facts: Iterable[Mapping[str, object]]) -> dict[str, int]:
    """How many rows name each teacher; empty where none does."""
    counts: dict[str, int] = {}
    for one in facts:
        if name := one.get(COLUMN):
            counts[str(name)] = counts.get(str(name), 0) + 1
    return counts
