"""The texts of sets that a run evaluates on, for decontamination."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from stillhouse.core.types import question_of
from stillhouse.data.datasets import DatasetConfig
from stillhouse.data.formats import read_row
from stillhouse.errors import DataError


def texts_of(sources: Iterable[DatasetConfig]) -> tuple[str, ...]:
    """Every text in the rows of some sets, once: questions, references, tests, turns of conversations.

    Raises:
        DataError: a file cannot be read.
    """
    found: dict[str, None] = {}
    for source in sources:
        for where, raw in islice(source.raw(Counter()), source.limit):
            found |= dict.fromkeys(text for text in _strings(raw) if text.strip())
            try:
                row = read_row(raw, source.fields, where)
            except DataError:
                continue  # a shape that a task of its own reads; all its strings are there
            if row.text is None:
                found[question_of(row.prompt_fields())] = None
    return tuple(found)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
