"""Filters of form: empty, truncated, or of the wrong format or length."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from stillhouse.rollouts.offline.filters.base import REGISTRY, Drop, Filter, FilterContext
from stillhouse.rollouts.offline.filters.ngrams import words
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class Empty(Filter):
    """Drops responses without text or with too few words."""

    kind: Literal["empty"] = "empty"
    min_words: Annotated[int, Field(ge=1)] = 1
    """The fewest words of a response that is kept; text without any letter or digit counts as one."""

    def check(self, sample: Sample, context: FilterContext) -> Drop | None:
        """Counts words."""
        count = len(words(sample.text)) or int(bool(sample.text.strip()))
        if count >= self.min_words:
            return None
        return Drop("too few words", f"{count}") if count else Drop("empty")


@REGISTRY.register
class Truncated(Filter):
    """Drops responses that were cut at the length limit, because they do not teach where to stop."""

    kind: Literal["truncated"] = "truncated"

    def check(self, sample: Sample, context: FilterContext) -> Drop | None:
        """Looks for the end-of-sequence token."""
        if sample.response.finished:
            return None
        return Drop("cut at the length limit", f"{len(sample.response.token_ids)} tokens")


@REGISTRY.register
class Format(Filter):
    """Drops responses that lack a required pattern or contain a forbidden one.

    Patterns are Python regular expressions, searched for anywhere in the response.

    Example: `{kind: format, match: '####\\s*-?[0-9]', forbid: 'As an AI'}`
    """

    kind: Literal["format"] = "format"
    match: str | None = None
    """A pattern that must be found."""
    forbid: str | None = None
    """A pattern that must not be found."""

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
    def _has_a_pattern(self) -> Self:
        if self.match is None and self.forbid is None:
            raise ValueError("needs match or forbid")
        return self

    def check(self, sample: Sample, context: FilterContext) -> Drop | None:
        """Searches for the patterns."""
        if self.match is not None and not re.search(self.match, sample.text):
            return Drop("lacks the wanted pattern")
        found = re.search(self.forbid, sample.text) if self.forbid is not None else None
        return Drop("has a forbidden pattern", repr(found.group())) if found else None


@REGISTRY.register
class LengthRatio(Filter):
    """Drops responses that are too short or too long for their prompt, or for the other response of the pair.

    Lengths are counted in tokens, or in words if a file has no tokens. Of a pair only the student's response
    is checked, because it can be generated again.

    Example: `{kind: length_ratio, relative_to: pair, max_ratio: 4.0}`
    """

    kind: Literal["length_ratio"] = "length_ratio"
    relative_to: Literal["prompt", "pair"] = "pair"
    """What the response is compared with; without pairs, `pair` drops nothing."""
    min_ratio: Annotated[float, Field(ge=0.0)] = 0.0
    """The smallest ratio of the response's length to the other length."""
    max_ratio: Annotated[float, Field(gt=0.0)] | None = None
    """The largest."""

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if not self.min_ratio and self.max_ratio is None:
            raise ValueError("needs min_ratio or max_ratio")
        if self.max_ratio is not None and self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio ({self.min_ratio}) is more than max_ratio ({self.max_ratio})")
        return self

    def check(self, sample: Sample, context: FilterContext) -> Drop | None:
        """Compares lengths."""
        response = sample.response
        if self.relative_to == "prompt":
            name = "prompt"
            tokens = (response.token_ids, response.prompt.token_ids)
            texts = (sample.text, response.prompt.question)
        else:
            partner = context.partners.get(sample.key)
            if response.source != "student" or partner is None or partner.missing:
                return None
            name = "other response"
            tokens, texts = (response.token_ids, partner.response.token_ids), (sample.text, partner.text)
        length, other = map(len, tokens) if all(tokens) else (len(words(text)) for text in texts)
        ratio = length / max(1, other)
        detail = f"{ratio:.2f} of the {name} ({length} to {other})"
        if ratio < self.min_ratio:
            return Drop("too short", detail)
        return Drop("too long", detail) if self.max_ratio is not None and ratio > self.max_ratio else None
