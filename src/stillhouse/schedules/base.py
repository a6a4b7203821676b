"""What a schedule is, and the type of config fields that take a number or a schedule."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError

from stillhouse.config import Registry, StrictConfig
from stillhouse.core.requirements import Requirements
from stillhouse.core.types import Progress

State = dict[str, float]
"""What an adaptive schedule carries from step to step."""


class Schedule(StrictConfig):
    """A hyper-parameter as a function of the training progress and, for adaptive ones, of observed metrics.

    A schedule is frozen: its state is a dictionary that `ScheduleTracker` keeps and checkpoints.
    """

    def requirements(self) -> Requirements:
        """What has to be measured for it; nothing by default."""
        return Requirements()

    def initial(self) -> State:
        """The state before the first step; empty for a schedule without state."""
        return {}

    def observe(self, state: State, name: str, value: float, progress: Progress) -> State:
        """The state after the metric `name` was measured as `value`.

        Args:
            state: the state before.
            name: "dev_loss", "train_loss", "teacher_gap" or "student_gap".
            value: nats per token for losses, a difference of likelihoods for gaps.
            progress: when it was measured.
        """
        return state

    @abstractmethod
    def value(self, progress: Progress, state: State) -> float:
        """The value at this step."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The minimum and maximum that it can take, checked against the range of the field it stands in."""


REGISTRY: Registry[Schedule] = Registry("schedule", Schedule, "linear")  # type: ignore[type-abstract]


def _parse(value: Any) -> Any:
    if isinstance(value, dict):
        return REGISTRY.parse(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Schedule):
        raise PydanticCustomError(
            "scheduled_type", "should be a number, or a schedule such as {example}", _EXAMPLE
        )
    return value


_EXAMPLE = {"example": "{kind: linear, start: 0.0, end: 1.0}"}


def scheduled(minimum: float = -math.inf, maximum: float = math.inf) -> Any:
    """The annotation of a config field: a float in [minimum, maximum], or a schedule bounded by it."""

    def check(value: float | Schedule) -> float | Schedule:
        low, high = value.bounds() if isinstance(value, Schedule) else (value, value)
        if low < minimum or high > maximum:
            got = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            raise PydanticCustomError(
                "scheduled_range",
                "must stay between {minimum} and {maximum}, got {got}",
                {"minimum": f"{minimum:g}", "maximum": f"{maximum:g}", "got": got},
            )
        return value

    return Annotated[float | SerializeAsAny[Schedule], AfterValidator(check), BeforeValidator(_parse)]


Share = scheduled(0.0, 1.0)
"""A number between 0 and 1, or a schedule."""

NonNegative = scheduled(0.0)
"""A number of at least 0, or a schedule."""
