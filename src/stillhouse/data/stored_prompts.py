"""The prompts of large data sets: on disk, and read when they are asked for."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, overload

from stillhouse.core.types import Prompt

IN_MEMORY = 65_536
"""Prompts up to which a data set is held in memory."""


class StoredPrompts(Sequence[Prompt]):
    """Prompts in a temporary file, which goes with the process. In memory are eight bytes of each.

    Example: `StoredPrompts(prompts)[17]`
    """

    def __init__(self, prompts: Iterable[Prompt] = ()) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the prompts
        self._ends = array("q", [0])
        self._places = range(0)
        self.extend(prompts)

    def extend(self, prompts: Iterable[Prompt]) -> None:
        """Add prompts at the end."""
        for prompt in prompts:
            content = pickle.dumps(prompt, protocol=pickle.HIGHEST_PROTOCOL)
            self._file.write(content)
            self._ends.append(self._ends[-1] + len(content))
        self._file.flush()
        self._places = range(len(self._ends) - 1)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._ends.itemsize * len(self._ends)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> StoredPrompts: ...
    def __getitem__(self, place: int | slice) -> Prompt | StoredPrompts:
        if isinstance(place, slice):
            part = StoredPrompts.__new__(StoredPrompts)
            part._file, part._ends, part._places = self._file, self._ends, self._places[place]
            return part
        start, end = self._ends[self._places[place]], self._ends[self._places[place] + 1]
        # In one call without a position of its own, so that processes that share the file may read at once.
        prompt: Prompt = pickle.loads(os.pread(self._file.fileno(), end - start, start))
        return prompt

    def __iter__(self) -> Iterator[Prompt]:
        return (self[place] for place in range(len(self)))


class PromptStore:
    """Gathers the prompts of a data set, in memory while they are few."""

    def __init__(self) -> None:
        self._few: list[Prompt] = []
        self._many: StoredPrompts | None = None

    def extend(self, prompts: Iterable[Prompt]) -> None:
        """Add prompts at the end."""
        if self._many is not None:
            self._many.extend(prompts)
            return
        self._few.extend(prompts)
        if len(self._few) > IN_MEMORY and not any(one.images or one.response_images for one in self._few):
            self._many = StoredPrompts(self._few)
            self._few.clear()

    def prompts(self) -> Sequence[Prompt]:
        """All of them, in order."""
        return tuple(self._few) if self._many is None else self._many
