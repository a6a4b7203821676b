"""Stage files: rows under a header that records how they were made, written by one process or many.

While a stage file `NAME.jsonl` is being written, each process appends finished rows to a shard of its own,
`NAME.shard-INDEX-of-COUNT.jsonl`. When every row is there, the shards are merged into `NAME.jsonl` in the
order of the rows' numbers. The result has the same bytes for any number of processes and after any
interruption. The finished file is JSON Lines, or Parquet if its name says so; both, and shards, may be in a
store such as s3://.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from stillhouse.config import flatten
from stillhouse.core.stage_tables import table_header, table_rows, write_table
from stillhouse.core.versions import installed_version
from stillhouse.errors import DataError
from stillhouse.files import STAGE, append_jsonl, atomic, is_shard, shards_beside, write_jsonl
from stillhouse.rollouts.offline.indexed_rows import IndexedRows, Row, parsed
from stillhouse.urls import is_remote

FORMAT = 3
SHARD = "shard"
"""The field of a shard's header that says which of how many it is, and how many rows it has when finished."""
_IGNORED = ("versions", SHARD)
"""Fields of a header that may differ."""
_PACKAGES = ("stillhouse", "torch", "transformers", "tokenizers")


def stage_header(stage: str, **facts: Any) -> dict[str, Any]:
    """A header: the kind of stage, the format, package versions, and whatever the rows depend on."""
    versions = {name: installed_version(name) for name in _PACKAGES}
    made = {"stage": stage, "format": FORMAT, **facts, "versions": versions}
    plain: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return plain


class StageMismatch(DataError):
    """A stage file whose header differs from the expected one."""


class StageFile:
    """A stage file, finished or in progress.

    Example:
        >>> stage = StageFile(Path("teacher.jsonl"), stage_header("responses", seed=1))
        >>> stage.append([{"number": 0, "response": "Fig"}])
        >>> stage.merge(total=1)
        >>> stage.rows()
    """

    def __init__(self, path: Path, header: Mapping[str, Any], index: int = 0, count: int = 1) -> None:
        """A stage file at `path`.

        Args:
            path: the finished file.
            header: how its rows are made; files with another header are never used.
            index: of the shard that this process appends to, from 0.
            count: number of shards.
        """
        self.path = path
        self.header = dict(header)
        self.shard = shard_path(path, index, count)
        self._place = {"index": index, "of": count}

    def rows(self) -> list[Row] | None:
        """The rows of the finished file in order; None if it does not exist.

        Raises:
            StageMismatch: its header differs; the message says in what.
            DataError: the file is damaged.
        """
        return list(read_rows(self.path)) if self.is_finished() else None

    def partial_rows(self) -> IndexedRows:
        """The finished rows in the shards of all processes, by number; a torn last line does not count.

        Raises:
            StageMismatch: the header of a shard differs.
        """
        return IndexedRows([shard for shard in self.shards() if self._check_header(shard)])

    def shards(self) -> list[Path]:
        """The shards on disk, sorted by name."""
        return shards_beside(self.path)

    def append(self, rows: Sequence[Row], share: int | None = None) -> None:
        """Append finished rows to this process's shard; a torn last line of an interrupted run is cut off.

        Args:
            rows: each with its number.
            share: how many rows the shard has when it is finished, where that is known.
        """
        place = {} if share is None else {SHARD: {**self._place, "rows": share}}
        header = {STAGE: {**self.header, **place}}
        if not is_remote(self.shard):
            append_jsonl(self.shard, *rows, header=header, sync=True)
            return
        parts = sum(one.name.startswith(f"{self.shard.stem}.part-") for one in self.shards())
        write_jsonl(self.shard.with_name(f"{self.shard.stem}.part-{parts}.jsonl"), [header, *rows])

    def is_finished(self) -> bool:
        """Whether the finished file is there.

        Raises:
            StageMismatch: its header differs; the message says in what.
        """
        if not self.path.exists():
            return False
        self._check_header(self.path)
        return True

    def merge(self, total: int, write: Callable[[IndexedRows], None] | None = None) -> bool:
        """Merge the shards into the finished file if all `total` rows are there; whether they are.

        Args:
            total: rows of all shards.
            write: writes the finished file; by default the rows as they are.
        """
        try:
            rows = self.partial_rows()
            if len(rows) < total:
                return False
            if write is None:
                write_rows(self.path, self.header, rows.values())
            else:
                write(rows)
        except FileNotFoundError:  # another process that found all of them has merged them meanwhile
            if not self.path.exists():
                raise
        self.remove_shards()
        return True

    def remove_shards(self) -> None:
        """Delete the shards whose rows are in the finished file.

        A process that was killed between the two writes of `merge` leaves them behind.
        """
        for shard in self.shards():
            if not header_differences(self.header, read_header(shard) or self.header):
                shard.unlink(missing_ok=True)

    def rename_stale(self) -> list[tuple[Path, list[str]]]:
        """Rename the file and the shards whose header differs, so that they are neither used nor lost.

        Returns:
            The new path of each, and in what its header differs.
        """
        renamed = []
        for path in (self.path, *self.shards()):
            if path.exists() and (found := header_differences(self.header, read_header(path))):
                free = _free_name(path)
                path.replace(free)
                renamed.append((free, found))
        return renamed

    def _check_header(self, path: Path) -> bool:
        """Refuse a file with another header; whether it has a whole one."""
        header = read_header(path)
        found = header_differences(self.header, header)
        if found:
            raise StageMismatch(
                f"{path}: was made in another way: {'; '.join(found)}. Choose another file, or move or "
                "delete this one."
            )
        return header is not None


def shard_path(path: Path, index: int, count: int) -> Path:
    """Where a shard of a stage file is."""
    return path.with_name(f"{path.stem}.shard-{index}-of-{count}.jsonl")


def write_rows(path: Path, header: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Write a finished file of any rows, atomically."""
    with atomic(path, "wb") as handle:
        if path.suffix == ".parquet":
            write_table(handle, header, rows)
        else:
            for row in chain([{STAGE: header}], rows):
                handle.write((json.dumps(row, ensure_ascii=False, default=str) + "\n").encode())


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a stage file; None for a shard that ends within its header.

    Raises:
        DataError: the file has no header, or a finished one is cut off within it.
    """
    if path.suffix == ".parquet":
        header = table_header(path)
        if header is None:
            raise DataError(f"{path}: is no stage file: its schema has no metadata {STAGE!r}.")
        return header
    with path.open("rb") as handle:
        line = handle.readline()
    if not line.endswith(b"\n") and is_shard(path):
        return None
    try:
        found = json.loads(line)[STAGE]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict):
        what = "its first line is no header" if line else "it is empty, and has no header"
        raise DataError(f"{path}: is no stage file: {what} such as {{{STAGE!r}: ...}}.")
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a stage file after its header, of a shard without a torn last line.

    Raises:
        DataError: another line cannot be read.
    """
    if path.suffix == ".parquet":
        yield from table_rows(path)
        return
    for _, row in located_rows(path):
        yield row


def located_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of JSON Lines under a header, each with the offset of its line."""
    offset, growing = 0, is_shard(path)
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if number > 1 and (line.endswith(b"\n") or not growing):
                yield offset, parsed(line, path, number)
            offset += len(line)


def header_differences(wanted: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[str]:
    """One line for each field in which two headers differ; none if there is no header to compare."""
    if found is None:
        return []
    expected, actual = (
        {name: value for name, value in flatten(header).items() if name.split(".")[0] not in _IGNORED}
        for header in (wanted, found)
    )
    return [
        f"{name} is {_shown(actual.get(name))}, not {_shown(expected.get(name))}"
        for name in dict.fromkeys((*expected, *actual))
        if expected.get(name) != actual.get(name)
    ]


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.stale-{number}{path.suffix}") for number in range(1, 10_000))
    return next(name for name in names if not name.exists())


def _shown(value: Any) -> str:
    return "missing" if value is None else json.dumps(value, ensure_ascii=False)
