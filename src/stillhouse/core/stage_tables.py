"""Stage files as Parquet: fields of known type as columns, any others as JSON text in one more column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from stillhouse.errors import DataError
from stillhouse.files import STAGE

OTHER = "other"
"""The column of the fields that have no column of their own, or another type than it has: a JSON object."""
_TEXTS = ("id", "source", "by", "prompt", "input", "response")
_NUMBERS = ("number", "sample", "student_version")
_LISTS = {"prompt_ids": int, "token_ids": int, "logprobs": float, "references": str}
_BATCH = 1024
"""Rows of a row group; fewer where they are large."""
_GROUP_CHARACTERS = 2**26


def write_table(handle: IO[bytes], header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as Parquet, a row group at a time, with the header in the metadata of the schema."""
    import pyarrow
    import pyarrow.parquet

    schema = _schema().with_metadata({STAGE: json.dumps(header, ensure_ascii=False, default=str)})
    with pyarrow.parquet.ParquetWriter(
        handle, schema, compression="zstd", write_page_checksum=True
    ) as writer:
        group: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            cells = _cells(row)
            group.append(cells)
            size += len(cells[OTHER] or "") + len(cells.get("response") or "")
            if len(group) == _BATCH or size > _GROUP_CHARACTERS:
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                group, size = [], 0
        writer.write_table(pyarrow.Table.from_pylist(group, schema))


def table_header(path: Path) -> dict[str, Any] | None:
    """The header of a stage file in Parquet; None if the file is another one.

    Raises:
        DataError: it is not Parquet.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as handle:
            found = (pyarrow.parquet.read_schema(handle).metadata or {}).get(STAGE.encode())
        header: dict[str, Any] | None = None if found is None else json.loads(found)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from error
    return header


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a stage file in Parquet, as they were written.

    Raises:
        DataError: the file is damaged; each page has a checksum.
    """
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as handle:
        try:
            file = pyarrow.parquet.ParquetFile(handle, page_checksum_verification=True)
            for batch in file.iter_batches(_BATCH):
                for cells in batch.to_pylist():
                    yield row_of(cells)
        except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
            raise DataError(f"{path}: is damaged ({error}). Delete the file to make it again.") from error


def row_of(cells: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a stage file from the cells of its columns."""
    own = {name: value for name, value in cells.items() if value is not None and name != OTHER}
    return own | (json.loads(cells[OTHER]) if cells[OTHER] is not None else {})


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in row.items() if _fits(name, value)}
    other = {name: value for name, value in row.items() if name not in own}
    return {**own, OTHER: json.dumps(other, ensure_ascii=False, default=str) if other else None}


def _fits(name: str, value: Any) -> bool:
    """Whether a value comes back from the column of its name as it was."""
    if name in _TEXTS:
        return isinstance(value, str)
    if name in _NUMBERS:
        return type(value) is int
    if name in _LISTS:
        return isinstance(value, list) and all(type(one) is _LISTS[name] for one in value)
    return name == "finished" and isinstance(value, bool)


def _schema() -> Any:
    import pyarrow as pa

    types = {int: pa.list_(pa.int32()), float: pa.list_(pa.float64()), str: pa.list_(pa.string())}
    return pa.schema(
        [
            *((name, pa.int64()) for name in _NUMBERS),
            *((name, pa.string()) for name in _TEXTS),
            ("finished", pa.bool_()),
            *((name, types[kind]) for name, kind in _LISTS.items()),
            (OTHER, pa.string()),
        ]
    )
