"""What a dataset is: where its rows are, and which of them are read as what."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from math import floor
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import Field

from stillhouse.config import Registry, StrictConfig, nearest
from stillhouse.data.formats.base import OPTIONAL_ROLES
from stillhouse.data.reading import Reading
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import DataError, RowError

LocatedRow = tuple[str, Mapping[str, Any]]
"""The location of a row ("train.jsonl:17"), and the row as the file has it."""


LARGE_BYTES, LARGE_ROWS = 2**23, 20_000
"""Sizes of files, and of datasets of the `datasets` library, from which on a dataset is large."""


class FoundRow(NamedTuple):
    """A row of a dataset before it is parsed, with all that parsing it needs; or a line that holds no row.

    Example: `FoundRow("train.jsonl:17", {"prompt": "A fruit?"})`
    """

    location: str
    content: Mapping[str, Any] | RowError
    folder: str = ""
    """Where paths in it begin."""
    part: int = 0
    """Which of the dataset's `parts` it is from."""
    copies: int = 1
    """How often it comes, by `weight`."""
    labelled: bool = True
    """Whether it keeps its response."""


class _Lines(Reading):
    """Gathers the lines that hold no row, in their place among the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[RowError] = []

    def drop(self, error: RowError) -> None:
        self.faults.append(error)

    def taken(self, part: int) -> Iterator[FoundRow]:
        """Those since the last call."""
        faults, self.faults = self.faults, []
        return (FoundRow(error.location, error, self.folder, part) for error in faults)


class DatasetConfig(StrictConfig):
    """A dataset. A bare path is enough if its ending tells the kind: `train: data/train.jsonl`."""

    PLACES: ClassVar[frozenset[str]] = frozenset({"path"})
    """The options that say where it is, and nothing about what it holds."""
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

    def content_digest(self) -> str | None:
        """A digest of the rows, as they are read with the settings of the dataset, wherever they are.

        None where rows are not on disk.
        """
        return None

    def digest_with_settings(self, content: str) -> str:
        """The digest of content that is read with the settings of the dataset."""
        settings = self.model_dump(mode="json", exclude=set(self.PLACES))
        return hashlib.sha256(json.dumps([content, settings], sort_keys=True).encode()).hexdigest()

    def places(self) -> list[str]:
        """Where the rows are, as messages about them say."""
        return [self.title]

    def check_found(self) -> None:
        """Refuse files that are not there, before anything loads.

        Raises:
            DataError: the file or folder is missing.
        """

    def is_large(self) -> bool:
        """Whether its prompts are better on disk than in memory."""
        return False

    def without_rows(self) -> DatasetConfig:
        """The same without rows that it holds itself."""
        return self

    def parts(self) -> tuple[DatasetConfig, ...]:
        """The datasets that it is mixed from; itself if it is one."""
        return (self,)

    def limited(self, rows: int) -> Self:
        """The same, with no more than so many rows of each of its `parts`."""
        return self.model_copy(update={"limit": min(rows, self.limit or rows)})

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
        for found in self.found_rows():
            yield from self.parsed(found, reading)

    def found_rows(self) -> Iterator[FoundRow]:
        """The rows before they are parsed, with `limit`, `labelled` and `weight` applied.

        Raises:
            DataError: a file is missing or broken, or `fields` names what no row has.
        """
        for number, part in enumerate(self.parts()):
            yield from part.found_rows_of_part(number)

    def found_rows_of_part(self, part: int) -> Iterator[FoundRow]:
        """The same of one of `parts`."""
        weight = Fraction(str(self.weight))
        missing = {role: name for role, name in self.fields.named.items() if role in OPTIONAL_ROLES}
        lines, number, content = _Lines(), 0, dict[str, Any]()
        for number, (location, content) in enumerate(self.raw(lines), start=1):  # type: ignore[assignment]
            yield from lines.taken(part)
            if missing:
                missing = {role: name for role, name in missing.items() if name not in content}
            copies = 1 if weight == 1 else floor(number * weight) - floor((number - 1) * weight)
            labelled = self.labelled is None or number <= self.labelled
            yield FoundRow(location, content, lines.folder, part, copies, labelled)
            if number == self.limit:
                break
        yield from lines.taken(part)
        if missing and number:
            role, name = next(iter(missing.items()))
            raise DataError(
                f"{self.title}: no row has a field {name!r} (fields.{role}){nearest(name, list(content))}"
            )

    def parsed(self, found: FoundRow, reading: Reading) -> Iterator[Row]:
        """A row of `found_rows` as often as it comes; none if it cannot be read and is dropped.

        Raises:
            DataError: it cannot be read, and such rows are refused.
        """
        if isinstance(found.content, RowError):
            reading.drop(found.content)
            return
        reading.folder = found.folder
        row = reading.read(found.content, self.parts()[found.part].fields, found.location)
        if row is None:
            return
        if not found.labelled:
            reading.unlabelled += row.has_response
            row = row.without_response()
        reading.rows += found.copies
        reading.rows_by_part[found.part] += found.copies
        if found.part:
            row = replace(row, source=found.part)
        for _ in range(found.copies):
            yield row


DATASETS: Registry[DatasetConfig] = Registry("dataset kind", DatasetConfig)  # type: ignore[type-abstract]
