"""Agreement with the answer that most responses to a prompt come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stillhouse.evaluate.rankers.base import REGISTRY, Ranker, RankingPlace
from stillhouse.grading.maths import equal_numbers, final_answer, last_number
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class MajorityRanker(Ranker):
    """1 for a response with the final answer that most responses to its prompt have, 0 for another one, as
    labels where no right answer is known (arXiv 2502.19557). Where two answers lead there is no label."""

    kind: Literal["majority"] = "majority"
    voters: Literal["teacher", "all"] = "teacher"
    """Whose responses vote: those of the teacher, or all."""

    def scores(self, groups: Sequence[Sequence[Sample]], place: RankingPlace) -> list[list[float | None]]:
        """By the value of the final answer: after `####`, boxed, or the last number."""
        return [self._labels(group) for group in groups]

    def _labels(self, group: Sequence[Sample]) -> list[float | None]:
        answers = [final_answer(sample.text) or last_number(sample.text) for sample in group]
        votes: list[tuple[str, int]] = []
        for sample, answer in zip(group, answers, strict=True):
            if answer is None or (self.voters == "teacher" and sample.response.source != "teacher"):
                continue
            known = next((n for n, (one, _) in enumerate(votes) if equal_numbers(answer, one)), None)
            if known is None:
                votes.append((answer, 1))
            else:
                votes[known] = (votes[known][0], votes[known][1] + 1)
        votes.sort(key=lambda vote: -vote[1])
        if not votes or (len(votes) > 1 and votes[0][1] == votes[1][1]):
            return [None] * len(group)
        return [float(equal_numbers(answer, votes[0][0])) for answer in answers]
