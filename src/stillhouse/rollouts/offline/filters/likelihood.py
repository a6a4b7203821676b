"""Text that the teacher itself would hardly write."""

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

    Text that the teacher finds likely teaches more than better text that it does not (DistiLLM-2, arXiv
    2503.07067, figure 2b). By default it looks at the teacher's side, where other generators' text may stand.

    Example: `{kind: logprob_floor, min_logprob: -1.5}`
    """

    kind: Literal["logprob_floor"] = "logprob_floor"
    source: Literal["all", "teacher", "student"] = "teacher"
    """Whose responses it looks at."""
    min_logprob: Annotated[float, Field(le=0.0)] | None = None
    """The lowest mean log-probability of a token that is kept, in nats."""
    drop_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Drop this share of the responses, the least likely ones (rounded down)."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if (self.min_logprob is None) == (self.drop_share is None):
            raise ValueError("needs either min_logprob or drop_share")
        return self

    def requirements(self) -> Requirements:
        """The likelihood of a response under the teacher."""
        return TEACHER_LOGPROB

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """By the measured scores.

        Raises:
            DataError: a sample was not scored.
        """
        for sample in samples:
            if "teacher" not in sample.scores:
                raise DataError(
                    f"{sample.response.prompt.id}: nobody has measured how likely the teacher finds it, "
                    "which the filter logprob_floor needs. Name the teacher."
                )
        scores = [sample.scores["teacher"] for sample in samples]
        floor = self.min_logprob
        low = set[int]()
        if self.drop_share is not None:
            order = sorted(range(len(scores)), key=lambda place: scores[place])
            low = set(order[: int(self.drop_share * len(order))])
        return [
            Drop("unlikely under the teacher", f"{score:.3f} nats a token")
            if place in low or (floor is not None and score < floor)
            else None
            for place, score in enumerate(scores)
        ]
