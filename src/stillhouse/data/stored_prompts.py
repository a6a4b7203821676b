"""The prompts of large data sets: on disk in Arrow files, and read when they are asked for."""

from __future__ import annotations

import io
import json
import pickle
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any, overload

from stillhouse.core.types import Prompt
from stillhouse.data.account import Account

PROMPTS, ACCOUNT = "prompts", "account"
"""The columns of the Arrow files, in which a row is a chunk: its prompts, and what became of its rows."""

_values_of = attrgetter(*(one.name for one in fields(Prompt)))
_DATA_TYPES = frozenset({
    ("datetime", "date"), ("datetime", "datetime"), ("datetime", "time"), ("datetime", "timedelta"),
    ("datetime", "timezone"), ("decimal", "Decimal"), ("uuid", "UUID"),
})  # fmt: skip
"""What a value of a row may be besides numbers, texts, bytes, lists and mappings."""


class _DataOnly(pickle.Unpickler):
    """Reads data and nothing that could run: a cache may be shared with others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DATA_TYPES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no data")


class _Witness(pickle.Pickler):
    """Counts the values that `_DataOnly` would not read, by their type."""

    def __init__(self, file: io.BytesIO, no_data: Counter[str]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.no_data = no_data

    def reducer_override(self, value: Any) -> Any:
        kind = value if isinstance(value, type) else type(value)
        if (kind.__module__, kind.__qualname__) not in _DATA_TYPES:
            self.no_data[f"{kind.__module__}.{kind.__qualname__}"] += 1
        return NotImplemented


def packed(prompt: Prompt, no_data: Counter[str]) -> bytes:
    """A prompt as bytes; what in it is no data is counted by its type."""
    content = io.BytesIO()
    _Witness(content, no_data).dump(_values_of(prompt))
    return content.getvalue()


def unpacked(content: bytes, own: bool = False) -> Prompt:
    """The prompt that `packed` wrote.

    Args:
        content: the bytes.
        own: whether this process has written them, so that they may hold more than data.

    Raises:
        pickle.UnpicklingError: they hold more, and may not.
    """
    return Prompt(*(pickle.loads(content) if own else _DataOnly(io.BytesIO(content)).load()))


def renumbered(prompts: Sequence[Prompt], name: str, before: int) -> Sequence[Prompt]:
    """The prompts of a chunk with their numbers among all: so many rows come before it."""
    return [replace(prompt, id=_later(prompt.id, name, before)) for prompt in prompts] if before else prompts


def _later(id: str, name: str, before: int) -> str:
    number, colon, output = id.removeprefix(f"{name}:").partition(":")
    return f"{name}:{int(number) + before}{colon}{output}"


class StoredPrompts(Sequence[Prompt]):
    """Prompts in Arrow files that are mapped into memory, of which a process holds what it reads.

    Example: `StoredPrompts("train", dataset)[17]`
    """

    def __init__(self, name: str, chunks: Any, own: bool = False) -> None:
        """Prompts on disk.

        Args:
            name: of the set, with which the ids begin.
            chunks: a `datasets.Dataset` with the columns `PROMPTS` and `ACCOUNT`.
            own: whether this process has written them.
        """
        self.name = name
        self._own = own
        self.account = Account()
        self._ends = array("q")
        self._before = array("q")
        self._chunks = chunks.with_format("arrow")
        total = 0
        for number in range(len(chunks)):
            chunk = self._chunks[number]
            self._before.append(self.account.numbered)
            self.account.add(Account.from_json(json.loads(chunk[ACCOUNT][0].as_py())))
            total += len(chunk[PROMPTS][0])
            self._ends.append(total)
        self._places = range(total)
        self._last: tuple[int, Any] = (-1, None)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without the mapped files."""
        return self._ends.itemsize * (len(self._ends) + len(self._before))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> StoredPrompts: ...
    def __getitem__(self, place: int | slice) -> Prompt | StoredPrompts:
        if isinstance(place, slice):
            part = StoredPrompts.__new__(StoredPrompts)
            part.__dict__.update(self.__dict__, _places=self._places[place])
            return part
        at = self._places[place]
        number = bisect_right(self._ends, at)
        last, chunk = self._last
        if last != number:
            chunk = self._chunks[number][PROMPTS].chunk(0).flatten()
            self._last = number, chunk
        prompt = unpacked(chunk[at - (self._ends[number - 1] if number else 0)].as_py(), self._own)
        return renumbered([prompt], self.name, self._before[number])[0]

    def __iter__(self) -> Iterator[Prompt]:
        return (self[place] for place in range(len(self)))
