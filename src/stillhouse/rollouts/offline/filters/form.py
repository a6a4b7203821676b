"""Filters of form: empty, cut, of the wrong shape or length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from stillhouse.rollouts.offline.filters.base import REGISTRY, Drop, Filter, FilterContext, words
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class Empty(Filter):
    """Drops responses without text, or with fewer words than wanted."""

    kind: Literal["empty"] = "empty"
    min_words: Annotated[int, Field(ge=1)] = 1
    """The fewest words of a response that is kept; a text of signs alone has one."""

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """By counting words."""
        return [self._check(sample.text) for sample in samples]

    def _check(self, text: str) -> Drop | None:
        count = len(words(text)) or int(bool(text.strip()))
        if count >= self.min_words:
            return None
        return Drop("too few words", f"{count}") if count else Drop("empty")


@REGISTRY.register
class Truncated(Filter):
    """Drops responses that the length limit cut: they never say where to stop."""

    kind: Literal["truncated"] = "truncated"

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """By the missing end-of-sequence token."""
        return [
            None
            if sample.response.finished
            else Drop("cut at the length limit", f"{len(sample.response.token_ids)} tokens")
            for sample in samples
        ]


@REGISTRY.register
class Format(Filter):
    """Drops responses in which a pattern is missing, or in which one is found that must not be.

    Patterns are Python regular expressions that are looked for anywhere in the response.

    Example: `{kind: format, match: '####\\s*-?[0-9]', forbid: 'As an AI'}`
    """

    kind: Literal["format"] = "format"
    match: str | None = None
    """Must be found."""
    forbid: str | None = None
    """Must not be found."""

    @field_validator("match", "forbid")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is no regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.match is None and self.forbid is None:
            raise ValueError("needs match or forbid")
        return self

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """By searching for the patterns."""
        return [self._check(sample.text) for sample in samples]

    def _check(self, text: str) -> Drop | None:
        if self.match is not None and not re.search(self.match, text):
            return Drop("lacks the wanted pattern")
        found = re.search(self.forbid, text) if self.forbid is not None else None
        return Drop("has a forbidden pattern", repr(found.group())) if found else None


@REGISTRY.register
class LengthRatio(Filter):
    """Drops responses that are too short or too long for their prompt, or for the other side of the pair.

    Lengths are counted in tokens, or in words where a file has no tokens. Of a pair the student's side is
    judged, because it can be written again.

    Example: `{kind: length_ratio, relative_to: pair, max_ratio: 4.0}`
    """

    kind: Literal["length_ratio"] = "length_ratio"
    relative_to: Literal["prompt", "pair"] = "pair"
    """What the response is compared with; without pairs, `pair` drops nothing."""
    min_ratio: Annotated[float, Field(ge=0.0)] = 0.0
    """The smallest length of the response, divided by that of the prompt or of the other side."""
    max_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """The largest."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.min_ratio and self.max_ratio is None:
            raise ValueError("needs min_ratio or max_ratio")
        if self.max_ratio is not None and self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio ({self.min_ratio}) is more than max_ratio ({self.max_ratio})")
        return self

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """By dividing lengths."""
        return [self._check(sample, context) for sample in samples]

    def _check(self, sample: Sample, context: FilterContext) -> Drop | None:
        response = sample.response
        if self.relative_to == "prompt":
            sizes = (response.token_ids, response.prompt.token_ids)
            texts = (sample.text, response.prompt.question)
        else:
            other = context.partners.get(sample.key)
            if response.source != "student" or other is None or other.missing:
                return None
            sizes, texts = (response.token_ids, other.response.token_ids), (sample.text, other.text)
        mine, theirs = map(len, sizes) if all(sizes) else (len(words(text)) for text in texts)
        ratio = mine / max(1, theirs)
        other_name = "prompt" if self.relative_to == "prompt" else "other response"
        detail = f"{ratio:.2f} of the {other_name} ({mine} to {theirs})"
        if ratio < self.min_ratio:
            return Drop("too short", detail)
        return Drop("too long", detail) if self.max_ratio is not None and ratio > self.max_ratio else None
