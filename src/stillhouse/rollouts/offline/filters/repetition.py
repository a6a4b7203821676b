"""Text that repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from stillhouse.rollouts.offline.filters.base import REGISTRY, Drop, Filter, FilterContext
from stillhouse.rollouts.offline.filters.ngrams import ngrams, raw_words
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class Repetition(Filter):
    """Drops responses in which too large a share of the n-grams are repetitions of earlier ones.

    share = 1 - (distinct n-grams) / (all n-grams). A text of fewer than two n-grams repeats nothing. Words
    are separated by spaces and keep case and punctuation; scripts without spaces (Chinese, Thai) are split
    into letters, and so is a text of one word (a long run of one character).

    Example: `{kind: repetition, n: 4, max_share: 0.3}`
    """

    kind: Literal["repetition"] = "repetition"
    n: Annotated[int, Field(ge=1)] = 4
    """Words in an n-gram."""
    max_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    """The largest share of repetitions that is kept."""

    def check(self, sample: Sample, context: FilterContext) -> Drop | None:
        """Counts distinct n-grams."""
        items: Sequence[str] = raw_words(sample.text)
        found = ngrams(items if len(items) > 1 else sample.text.strip(), self.n)
        share = 1 - len(set(found)) / len(found) if found else 0.0
        if share <= self.max_share:
            return None
        return Drop("repeats itself", f"{share:.2f} of its {self.n}-grams")
