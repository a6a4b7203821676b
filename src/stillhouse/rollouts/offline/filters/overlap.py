"""Decontamination: training text that also occurs in the evaluation sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.config import ListOf
from stillhouse.core.requirements import Requirements
from stillhouse.core.types import question_of
from stillhouse.data.datasets import DatasetConfig, DatasetField
from stillhouse.data.formats import read_row
from stillhouse.data.reading import Reading
from stillhouse.errors import DataError
from stillhouse.rollouts.offline.filters.base import REGISTRY, Drop, Filter, FilterContext
from stillhouse.rollouts.offline.filters.ngrams import ngrams, words
from stillhouse.rollouts.offline.samples import Sample

Gram = tuple[str, ...]


@REGISTRY.register
class Overlap(Filter):
    """Drops responses that share an n-gram of words with the evaluation sets, or whose prompt does.

    Prompt and response, without the words of the template, are compared with every single text in the rows of
    the sets that the run evaluates on (evaluate.data, data.valid, evaluate.tasks). A prompt shorter than n
    words overlaps if an evaluation text of the same words exists; so short a response never does, because
    "yes" is the answer to many questions. The usual n is 13 for long texts (GPT-3, arXiv 2005.14165, appendix
    C) and 8 for short ones.

    Example: `{kind: overlap, n: 8}`
    """

    kind: Literal["overlap"] = "overlap"
    n: Annotated[int, Field(ge=1)] = 13
    """Words in an n-gram."""
    max_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """The largest share of common n-grams, in the prompt or in the response, that is kept."""
    compare: Literal["both", "prompt", "response"] = "both"
    """What is compared with the evaluation sets."""
    against: ListOf[DatasetField] | None = None
    """Other sets to compare with, instead of those that the run evaluates on."""

    def requirements(self) -> Requirements:
        """The texts that the run evaluates on."""
        return Requirements(data=frozenset({"evaluation_texts"}))

    def compares_responses(self) -> bool:
        """It does not."""
        return False

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """Looks for common n-grams."""
        key = self.model_dump_json()
        held_out = context.memory.get(key)
        if held_out is None:
            held_out = {gram for text in self._held_out(context) for gram in self._ngrams(text)}
            context.memory[key] = held_out
        return [self._compare(sample, held_out) for sample in samples]

    def _compare(self, sample: Sample, held_out: set[Gram]) -> Drop | None:
        texts = {"prompt": sample.response.prompt.question, "response": sample.text}
        for name, text in texts.items():
            if self.compare not in ("both", name):
                continue
            own = self._ngrams(text)
            if name == "response" and own and len(own[0]) < self.n:
                continue
            common = [gram for gram in own if gram in held_out]
            if common and len(common) > self.max_share * len(own):
                detail = f"{len(common)} of {len(own)} n-grams, first {' '.join(common[0])!r}"
                return Drop(f"{name} is in an evaluation set", detail)
        return None

    def _ngrams(self, text: str) -> list[Gram]:
        parts = words(text)
        return ngrams(parts, self.n) or ([tuple(parts)] if parts else [])

    def _held_out(self, context: FilterContext) -> Sequence[str]:
        return context.held_out() if self.against is None else held_out_texts(self.against)


def held_out_texts(datasets: Iterable[DatasetConfig]) -> tuple[str, ...]:
    """Every distinct text in the rows of some datasets: questions, references, tests, turns of conversations.

    Raises:
        DataError: a file cannot be read.
    """
    found: dict[str, None] = {}
    for dataset in datasets:
        for part, (where, raw) in dataset.raw_by_part(Reading("drop")):
            found |= dict.fromkeys(text for text in _strings(raw) if text.strip())
            try:
                row = read_row(raw, part.fields, where)
            except DataError:
                continue  # rows that only a task understands; all their strings are collected
            if row.has_prompt:
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
