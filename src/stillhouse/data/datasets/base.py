"""What a dataset is: where its rows are, and which of them are read as what."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import islice
from math import floor
from typing import Annotated, Any

from pydantic import Field

from stillhouse.config import Registry, StrictConfig, nearest
from stillhouse.data.formats.base import OPTIONAL_ROLES
from stillhouse.data.reading import Reading
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import DataError

LocatedRow = tuple[str, Mapping[str, Any]]
"""The location of a row ("train.jsonl:17"), and the row as the file has it."""


class DatasetConfig(StrictConfig):
    """A dataset. A bare path is enough if its ending tells the kind: `train: data/train.jsonl`."""

    kind: str
    fields: Fields = Fields()
    """Which field of a row holds what; only needed for rows in none of the known formats."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Number of rows to read, from the first; default: all."""
    labelled: Annotated[int, Field(ge=0)] | None = None
    """Number of rows, from the first, that keep their response; the others become prompts without one."""
    each_output: bool = False
    """Make one example of each output of a row; by default the first output is the response and all of them
    are references."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often its rows are in an epoch: 2 is each row twice, 0.5 every second row, 1.5 each row once and
    every second one twice. The same rows in each epoch and on every machine."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What messages and data.json call it, such as its path."""

    @abstractmethod
    def raw(self, reading: Reading) -> Iterator[LocatedRow]:
        """The rows as the file has them; lines that hold no row are given to `reading`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest of the content."""

    def check_found(self) -> None:
        """Refuse files that are not there, before anything loads.

        Raises:
            DataError: the file or folder is missing.
        """

    def parts(self) -> tuple[DatasetConfig, ...]:
        """The datasets that it is mixed from; itself if it is one."""
        return (self,)

    def raw_by_part(self, reading: Reading) -> Iterator[tuple[DatasetConfig, LocatedRow]]:
        """The first `limit` rows as the files have them, each with the one of `parts` that it is from."""
        for part in self.parts():
            for located in islice(part.raw(reading), part.limit):
                yield part, located

    def rows(self, reading: Reading) -> Iterator[Row]:
        """The parsed rows, with `limit`, `labelled` and `weight` applied.

        Row k (from 1) comes floor(k w) - floor((k - 1) w) times for a weight of w, so that repeated and left
        out rows are spread evenly.

        Args:
            reading: says what happens to rows that cannot be read, and counts.

        Raises:
            DataError: the file is missing, a line cannot be parsed or a row has no known format.
        """
        weight = Fraction(str(self.weight))
        missing = {role: name for role, name in self.fields.named().items() if role in OPTIONAL_ROLES}
        number = 0
        for number, (location, raw) in enumerate(self.raw(reading), start=1):
            missing = {role: name for role, name in missing.items() if name not in raw}
            copies = floor(number * weight) - floor((number - 1) * weight)
            row = reading.read(raw, self.fields, location)
            if row is not None and self.labelled is not None and number > self.labelled:
                reading.unlabelled += row.has_response
                row = row.without_response()
            if row is not None:
                reading.rows += copies
                for _ in range(copies):
                    yield row
            if number == self.limit:
                break
        if missing and number:
            role, name = next(iter(missing.items()))
            raise DataError(
                f"{self.title}: no row has a field {name!r} (fields.{role}){nearest(name, list(raw))}"
            )


DATASETS: Registry[DatasetConfig] = Registry("dataset kind", DatasetConfig)  # type: ignore[type-abstract]
