"""Rows of JSON Lines by number, found through an index of their places and read when they are asked for."""

from __future__ import annotations

import json
import re
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import DataError
from stillhouse.urls import is_remote, local_copy

Row = dict[str, Any]

_NUMBER = re.compile(rb'\{"number": (\d+)[,}]')
_MOST_OPEN = 64
"""Files that are held open at a time."""


class OpenFiles:
    """Files of JSON Lines whose rows are read by offset; not all of them are held open."""

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        self._paths = list(paths)
        self._copies = tempfile.TemporaryDirectory() if any(map(is_remote, paths)) else None
        self.local = [local_copy(path, Path(self._copies.name)) if self._copies else path for path in paths]
        """Where they are on disk; of those in a store a copy."""
        self._open: dict[int, IO[bytes]] = {}
        self._spools: dict[int, IO[bytes]] = {}

    def add(self, path: Path, spool: IO[bytes] | None = None) -> int:
        """Add a file, or an open one that stands for it; its number."""
        self._paths.append(path)
        self.local.append(path)
        if spool is not None:
            self._spools[len(self._paths) - 1] = spool
        return len(self._paths) - 1

    def read(self, file: int, offset: int) -> tuple[bytes, Row]:
        """The line of a file that begins at an offset, and the row in it.

        Raises:
            DataError: it is damaged.
        """
        handle = self._handle(file)
        handle.seek(offset)
        line = handle.readline()
        try:
            return line, json.loads(line)
        except ValueError:
            handle.seek(0)
            return line, parsed(line, self._paths[file], handle.read(offset).count(b"\n") + 1)

    def _handle(self, file: int) -> IO[bytes]:
        found = self._spools.get(file) or self._open.get(file)
        if found is None:
            if len(self._open) == _MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            found = self._open[file] = self.local[file].open("rb")
        return found

    def __del__(self) -> None:
        for handle in (*self._open.values(), *self._spools.values()):
            handle.close()


class IndexedRows(Mapping[int, Row]):
    """The rows of stage files by number, in the order of the numbers. A torn last line is none.

    In memory are only number, file and offset of each row: at most 20 bytes.

    Example:
        >>> rows = IndexedRows([Path("a.shard-0-of-2.jsonl"), Path("a.shard-1-of-2.jsonl")])
        >>> rows[17]["response"]
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Index files, each under a header.

        Raises:
            DataError: a line has no number.
        """
        self._opened = OpenFiles(paths)
        numbers, offsets, sizes = array("q"), array("q"), []
        for path, local in zip(paths, self._opened.local, strict=True):
            before = len(numbers)
            for number, offset in _places(path, local):
                numbers.append(number)
                offsets.append(offset)
            sizes.append(len(numbers) - before)
        self._numbers = np.frombuffer(numbers, dtype=np.int64)  # the arrays' own memory
        self._offsets: NDArray[np.int64] = np.frombuffer(offsets, dtype=np.int64)
        self._files = np.repeat(np.arange(len(sizes), dtype=np.min_scalar_type(len(sizes))), sizes)
        if not (self._numbers[1:] > self._numbers[:-1]).all():  # of one shard they are in order
            self._numbers, order = np.unique(self._numbers, return_index=True)
            self._offsets, self._files = self._offsets[order], self._files[order]

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return self._numbers.nbytes + self._offsets.nbytes + self._files.nbytes

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        return map(int, self._numbers)

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self._place(number) is not None

    def __getitem__(self, number: int) -> Row:
        place = self._place(number)
        if place is None:
            raise KeyError(number)
        return self._opened.read(int(self._files[place]), int(self._offsets[place]))[1]

    def _place(self, number: int) -> int | None:
        place = int(np.searchsorted(self._numbers, number))
        return place if place < len(self) and self._numbers[place] == number else None


def parsed(line: bytes, path: Path, at: int) -> Row:
    """A line of a stage file.

    Raises:
        DataError: it is damaged.
    """
    try:
        found: Row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{at}: is damaged ({error}). Delete the file to make it again.") from None
    return found


def _places(path: Path, local: Path) -> Iterator[tuple[int, int]]:
    """Number and offset of each row of a file, which lies on disk in another place if it is in a store."""
    offset = 0
    with open(local, "rb") as handle:
        for at, line in enumerate(handle, start=1):
            if at > 1 and line.endswith(b"\n"):
                found = _NUMBER.match(line)
                number = found.group(1) if found is not None else parsed(line, path, at).get("number")
                if number is None:
                    raise DataError(f"{path}:{at}: is no row of a stage file: it has no number")
                yield int(number), offset
            offset += len(line)
