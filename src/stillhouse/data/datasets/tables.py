"""Tables: CSV and TSV, Parquet, Arrow."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from stillhouse.core.stage_tables import row_of
from stillhouse.data.datasets.base import DATASETS, LocatedRow
from stillhouse.data.datasets.files import FileDataset, opened, wrong_encoding
from stillhouse.data.datasets.json_lines import row_of_stage
from stillhouse.data.reading import Reading
from stillhouse.errors import DataError, RowError
from stillhouse.files import STAGE
from stillhouse.urls import is_remote

_LARGEST_CELL = 2**31 - 1


@DATASETS.register
class Csv(FileDataset):
    """A table of text with a header (.csv, .tsv); lists in cells are JSON text, an empty cell is none."""

    kind: Literal["csv"] = "csv"
    delimiter: str | None = None
    """What separates cells; default: a tab in .tsv, else a comma, or the semicolon or tab of a header that
    has no comma."""

    def rows_of(self, path: Path, reading: Reading) -> Iterator[LocatedRow]:
        """The rows below the header."""
        csv.field_size_limit(_LARGEST_CELL)
        with opened(path) as handle:
            text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
            try:
                yield from self._rows(path, text, reading)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: {wrong_encoding(error)}") from error
            except csv.Error as error:
                raise DataError(f"{path}: cannot be read as CSV ({error})") from error

    def _rows(self, path: Path, text: io.TextIOWrapper, reading: Reading) -> Iterator[LocatedRow]:
        first = text.readline()
        lines = (line for part in ((first,), text) for line in part)
        cells = csv.reader(lines, delimiter=self._delimiter(path, first), strict=True)
        header = [name.strip() for name in next(cells, [])]
        if len(set(header)) < len(header) or "" in header:
            raise DataError(f"{path}:1: the header needs a different name for each column; got {header}")
        while True:
            line = cells.line_num + 1
            row = next(cells, None)
            if row is None:
                return
            location = f"{path}:{line}"
            if not any(row):
                continue
            if len(row) != len(header):
                problem = f"has {len(row)} cells, and the header has {len(header)}"
                reading.drop(RowError(location, problem, "cells that do not fit the header"))
                continue
            yield location, {name: cell or None for name, cell in zip(header, row, strict=True)}

    def _delimiter(self, path: Path, header: str) -> str:
        if self.delimiter is not None:
            return self.delimiter
        if ".tsv" in path.suffixes:
            return "\t"
        found = [one for one in (",", ";", "\t", "|") if one in header]
        return found[0] if found else ","


@DATASETS.register
class Parquet(FileDataset):
    """A Parquet file; of one that `stillhouse generate` or `curate` wrote, what its rows hold."""

    kind: Literal["parquet"] = "parquet"

    def rows_of(self, path: Path, reading: Reading) -> Iterator[LocatedRow]:
        """The rows, read in batches."""
        import pyarrow
        import pyarrow.parquet

        try:
            with path.open("rb") as handle:
                file = pyarrow.parquet.ParquetFile(handle)
                staged = STAGE.encode() in (file.schema_arrow.metadata or {})
                for location, row in _located(path, file.iter_batches(batch_size=1024)):
                    yield location, row_of_stage(row_of(row)) if staged else row
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: cannot be read as Parquet ({error})") from error


@DATASETS.register
class Arrow(FileDataset):
    """An Arrow file (.arrow), as the `datasets` library keeps them."""

    kind: Literal["arrow"] = "arrow"

    def rows_of(self, path: Path, reading: Reading) -> Iterator[LocatedRow]:
        """The rows, read in batches."""
        import pyarrow

        try:
            with path.open("rb") if is_remote(path) else pyarrow.memory_map(str(path)) as source:
                try:
                    yield from _located(path, pyarrow.ipc.open_stream(source))
                except pyarrow.ArrowInvalid:
                    file = pyarrow.ipc.open_file(source)
                    yield from _located(path, (file.get_batch(n) for n in range(file.num_record_batches)))
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: cannot be read as Arrow ({error})") from error


def _located(path: Path, batches: Iterable[Any]) -> Iterator[LocatedRow]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}[{number}]", without_nested_nulls(row)


def table_digest(dataset: Any) -> str:
    """A digest of the rows of a `datasets.Dataset` in their order, whichever files they are in.

    The library's own fingerprint is of how a dataset was made, with hashes of pickled functions.
    """
    digest = hashlib.sha256(str(dataset.features).encode())
    for table in dataset.with_format("arrow").iter(batch_size=4096):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def without_nested_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the keys that inner objects have only because those of other rows do."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
