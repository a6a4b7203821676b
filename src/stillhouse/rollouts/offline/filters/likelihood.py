"""Responses that are unlikely under the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stillhouse.core.requirements import Requirements
from stillhouse.errors import DataError
from stillhouse.rollouts.offline.filters.base import REGISTRY, TEACHER_LOGPROB, Drop, Filter, FilterContext
from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class LogprobFloor(Filter):
    """Drops responses of low mean log-probability under the teacher, 1/T sum_t log p(y_t | x, y_<t) in nats.

    Responses that are likely under the teacher teach more than better ones that are not (DistiLLM-2, arXiv
    2503.07067, figure 2b). By default only the teacher's responses are checked, for which those of other
    generators may stand in.

    Example: `{kind: logprob_floor, min_logprob: -1.5}`
    """

    kind: Literal["logprob_floor"] = "logprob_floor"
    source: Literal["all", "teacher", "student"] = "teacher"
    """Which responses of a pair it applies to."""
    min_logprob: Annotated[float, Field(le=0.0)] | None = None
    """The lowest mean log-probability that is kept, in nats per token."""
    drop_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The share of the responses, the least likely ones, that is dropped (rounded down)."""

    @model_validator(mode="after")
    def _has_one_limit(self) -> Self:
        if (self.min_logprob is None) == (self.drop_share is None):
            raise ValueError("needs either min_logprob or drop_share")
        return self

    def requirements(self) -> Requirements:
        """The likelihood of a response under the teacher."""
        return TEACHER_LOGPROB

    def compares_responses(self) -> bool:
        """Whether a share is dropped."""
        return self.drop_share is not None

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """Compares the scores.

        Raises:
            DataError: a sample was not scored.
        """
        for sample in samples:
            if "teacher" not in sample.scores:
                raise DataError(
                    f"{sample.response.prompt.id}: has no log-probability under the teacher, which "
                    "logprob_floor needs. Name the teacher."
                )
        scores = [sample.scores["teacher"] for sample in samples]
        if self.min_logprob is not None:
            low = {place for place, score in enumerate(scores) if score < self.min_logprob}
        else:
            assert self.drop_share is not None
            order = sorted(range(len(scores)), key=lambda place: scores[place])
            low = set(order[: int(self.drop_share * len(order))])
        return [
            Drop("unlikely under the teacher", f"{score:.3f} nats a token") if place in low else None
            for place, score in enumerate(scores)
        ]
