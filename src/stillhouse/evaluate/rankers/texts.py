"""Rankers that compare a response with what the row holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from stillhouse.evaluate.metrics.text import rouge_l_if_referenced
from stillhouse.evaluate.rankers.base import REGISTRY, Ranker, RankingPlace
from stillhouse.rollouts.offline.filters import REGISTRY as FILTERS
from stillhouse.rollouts.offline.filters.base import FilterContext
from stillhouse.rollouts.offline.samples import Sample

_NOTHING_TO_CHECK = "nothing to check it by"


@REGISTRY.register
class RougeLRanker(Ranker):
    """ROUGE-L against the row's references, 0 to 100; rows without a reference cannot be answered."""

    kind: Literal["rouge_l"] = "rouge_l"

    def scores(self, groups: Sequence[Sequence[Sample]], place: RankingPlace) -> list[list[float | None]]:
        """The best over the references."""
        return [
            rouge_l_if_referenced(
                [sample.text for sample in group], [sample.response.prompt.references for sample in group]
            )
            for group in groups
        ]


@REGISTRY.register
class VerifierRanker(Ranker):
    """1 for a right answer and 0 for a wrong one: a final answer by value, a program by the row's tests in
    the sandbox (see the filter `verified`)."""

    kind: Literal["verifier"] = "verifier"
    timeout: Annotated[float, Field(gt=0.0)] = 10.0
    """Seconds that a program and its tests may take."""

    def scores(self, groups: Sequence[Sequence[Sample]], place: RankingPlace) -> list[list[float | None]]:
        """By the filter; None where the row has nothing to check an answer by."""
        check = FILTERS.parse({"kind": "verified", "unverifiable": "drop", "timeout": self.timeout})
        drops = iter(check.apply([sample for group in groups for sample in group], FilterContext()))
        found: list[list[float | None]] = []
        for group in groups:
            own = [next(drops) for _ in group]
            found.append(
                [1.0 if drop is None else None if drop.reason == _NOTHING_TO_CHECK else 0.0 for drop in own]
            )
        return found
