"""The rows of a dataset in chunks: what is tokenised in one call, and in one process or another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from stillhouse.core.types import Prompt
from stillhouse.data.account import Account
from stillhouse.data.config import DataConfig
from stillhouse.data.datasets import DatasetConfig
from stillhouse.data.datasets.base import FoundRow
from stillhouse.data.prompt_builder import PromptBuilder
from stillhouse.data.reading import Reading
from stillhouse.data.teacher_context import OTHER
from stillhouse.data.teacher_prompts import TeacherReads
from stillhouse.data.tokenise import Encoder
from stillhouse.errors import DataError

CHUNK_ROWS = 1024
"""Rows of a chunk."""
LOOKED_AT = 64
"""Rows that are looked at for images before a set is tokenised."""
CHUNK_CHARACTERS = 2**24
"""Characters of the rows of a chunk, but for the one that goes beyond."""


class ChunkEncoder:
    """Turns chunks of the rows of one dataset into prompts. Other processes may have copies.

    The numbers in the ids of its prompts begin with 1 in each chunk.

    Example: `prompts, account = ChunkEncoder("train", dataset, config, encoder)(chunk)`
    """

    def __init__(
        self,
        name: str,
        dataset: DatasetConfig,
        config: DataConfig,
        encoder: Encoder,
        needs: Collection[str] = (),
        teacher: TeacherReads | None = None,
    ) -> None:
        """See `load_prompts` for the arguments."""
        self.name = name
        self.dataset = dataset
        self.config = config
        self.encoder = encoder
        self.needs = frozenset(needs)
        self.teacher = teacher
        self._before: Any = None

    def __call__(self, chunk: Iterable[FoundRow]) -> tuple[list[Prompt], Account]:
        """The prompts of some rows, and what became of the others.

        Raises:
            DataError: a row cannot be used, and such rows are refused.
        """
        reading = self.config.reading()
        builder = PromptBuilder(
            self.name,
            self.dataset,
            self.config,
            self.encoder,
            reading=reading,
            needs=self.needs,
            teacher=self.teacher,
        )
        builder.before = self._before
        rows = (row for found in chunk for row in self.dataset.parsed(found, reading))
        builder.add(list(builder.with_ids(rows)))
        self._before = builder.before
        return builder.prompts, builder.account()

    @property
    def contexts(self) -> dict[str, str]:
        """What teachers read beside the prompt; see `data.teacher_context`."""
        return dict(self.config.teacher_context) if self.name == "train" else {}

    @property
    def in_order(self) -> bool:
        """Whether a chunk can only be read after the one before it: a context shows the row before."""
        return any(f"{{{OTHER}" in context for context in self.contexts.values())

    def begins_with_images(self) -> bool:
        """Whether one of the first rows has images."""
        if self.encoder.expander is None:
            return False
        reading = Reading("drop")
        first = islice(self.dataset.found_rows(), LOOKED_AT)
        return any(row.image_values for found in first for row in self.dataset.parsed(found, reading))

    def without_rows(self) -> ChunkEncoder:
        """The same for another process: the dataset holds no rows of its own."""
        return ChunkEncoder(
            self.name, self.dataset.without_rows(), self.config, self.encoder, self.needs, self.teacher
        )


def chunked(rows: Iterable[FoundRow]) -> Iterator[list[FoundRow]]:
    """Chunks of rows. Where rows cannot be read further, those before come first.

    Raises:
        DataError: see `DatasetConfig.found_rows`.
    """
    chunk: list[FoundRow] = []
    size = 0
    try:
        for row in rows:
            chunk.append(row)
            size += _characters(row.content)
            if len(chunk) == CHUNK_ROWS or size >= CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    except DataError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _characters(value: Any) -> int:
    """About how much a value of a row holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, Sequence) else 1
