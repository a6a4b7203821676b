"""Rows of JSON Lines by number, found through an index of their places and read when they are asked for."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import DataError

Row = dict[str, Any]

_NUMBER = re.compile(rb'\{"number": (\d+)[,}]')
_OPEN_FILES = 64
"""Files that are held open at a time."""


class IndexedRows(Mapping[int, Row]):
    """The rows of stage files by number, in the order of the numbers. A torn last line is none.

    In memory are only number, file and offset of each row: 18 bytes.

    Example:
        >>> rows = IndexedRows([Path("a.shard-0-of-2.jsonl"), Path("a.shard-1-of-2.jsonl")])
        >>> rows[17]["response"]
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Index files, each under a header.

        Raises:
            DataError: a line has no number.
        """
        self._paths = list(paths)
        self._open: dict[int, IO[bytes]] = {}
        numbers, offsets, sizes = array("q"), array("q"), []
        for path in self._paths:
            before = len(numbers)
            for number, offset in _places(path):
                numbers.append(number)
                offsets.append(offset)
            sizes.append(len(numbers) - before)
        found = np.frombuffer(numbers, dtype=np.int64)
        self._numbers, order = np.unique(found, return_index=True)
        self._offsets: NDArray[np.int64] = np.frombuffer(offsets, dtype=np.int64)[order]
        self._files = np.repeat(np.arange(len(sizes), dtype=np.uint16), sizes)[order]

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return self._numbers.nbytes + self._offsets.nbytes + self._files.nbytes

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __contains__(self, number: object) -> bool:
        place = int(np.searchsorted(self._numbers, number))  # type: ignore[call-overload]
        return place < len(self) and self._numbers[place] == number

    def __getitem__(self, number: int) -> Row:
        place = int(np.searchsorted(self._numbers, number))
        if place == len(self) or self._numbers[place] != number:
            raise KeyError(number)
        return self._parsed(place)[1]

    def lines(self) -> Iterator[bytes]:
        """The lines of all rows as they are, in order.

        Raises:
            DataError: a line is damaged.
        """
        for place in range(len(self)):
            yield self._parsed(place)[0]

    def _parsed(self, place: int) -> tuple[bytes, Row]:
        file, offset = int(self._files[place]), int(self._offsets[place])
        handle = self._handle(file)
        handle.seek(offset)
        line = handle.readline()
        try:
            return line, json.loads(line)
        except ValueError as error:
            handle.seek(0)
            at = handle.read(offset).count(b"\n") + 1
            problem = f"{self._paths[file]}:{at}: is damaged ({error}). Delete the file to make it again."
            raise DataError(problem) from None

    def _handle(self, file: int) -> IO[bytes]:
        found = self._open.get(file)
        if found is None:
            if len(self._open) == _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            found = self._open[file] = self._paths[file].open("rb")
        return found

    def __del__(self) -> None:
        for handle in getattr(self, "_open", {}).values():
            handle.close()


def _places(path: Path) -> Iterator[tuple[int, int]]:
    """Number and offset of each row."""
    offset = 0
    with open(path, "rb") as handle:
        for at, line in enumerate(handle, start=1):
            if at > 1 and line.endswith(b"\n"):
                yield _number(line, path, at), offset
            offset += len(line)


def _number(line: bytes, path: Path, at: int) -> int:
    found = _NUMBER.match(line)
    if found is not None:
        return int(found.group(1))
    try:
        return int(json.loads(line)["number"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}:{at}: is damaged ({error}). Delete the file to make it again.") from None
