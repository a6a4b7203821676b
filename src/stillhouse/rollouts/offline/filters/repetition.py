"""Text that goes round in circles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from stillhouse.rollouts.offline.filters.base import REGISTRY, Drop, Filter, FilterContext, grams, pieces
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class Repetition(Filter):
    """Drops responses of whose n-grams too many have occurred before in the same response.

    share = 1 - (different n-grams) / (all n-grams). In a text of fewer than two n-grams nothing repeats.
    Words are what stands between spaces, case and punctuation included; scripts without spaces (Chinese,
    Thai) are looked at letter by letter, and so is a text of one word (a long run of one sign).

    Example: `{kind: repetition, n: 4, max_share: 0.3}`
    """

    kind: Literal["repetition"] = "repetition"
    n: Annotated[int, Field(ge=1)] = 4
    """Words in an n-gram."""
    max_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    """The largest share of n-grams that may be repetitions."""

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """By counting n-grams."""
        return [self._check(sample.text) for sample in samples]

    def _check(self, text: str) -> Drop | None:
        parts: Sequence[str] = pieces(text)
        every = grams(parts if len(parts) > 1 else text.strip(), self.n)
        share = 1 - len(set(every)) / len(every) if every else 0.0
        if share <= self.max_share:
            return None
        return Drop("repeats itself", f"{share:.2f} of its {self.n}-grams")
