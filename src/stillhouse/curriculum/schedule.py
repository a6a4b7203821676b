"""A number that may move: either a float or a schedule that gives one at each step."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError

from stillhouse.config import Part, Registry
from stillhouse.types import Progress

State = dict[str, float]


class Schedule(Part):
    """Gives a number from the progress and, for adaptive ones, from what was observed.

    A schedule is frozen; what it remembers is a plain dictionary that the curriculum keeps and saves.
    """

    def initial(self) -> State:
        """What it remembers before the first step."""
        return {}

    def observe(self, state: State, name: str, value: float, progress: Progress) -> State:
        """The state after `name` ("dev_loss", "train_loss") was measured as `value`, at `progress`.

        Schedules without state ignore it.
        """
        return state

    @abstractmethod
    def value(self, progress: Progress, state: State) -> float:
        """The number at this step."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest number it can give; the field's own limits are checked against them."""


REGISTRY: Registry[Schedule] = Registry("schedule", Schedule)  # type: ignore[type-abstract]


class _Ramp(Schedule):
    start: float
    end: float
    until: float = 1.0
    """Share of the training after which `end` is reached and kept."""

    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)

    def _along(self, progress: Progress) -> float:
        return min(1.0, progress.fraction / self.until) if self.until > 0 else 1.0


@REGISTRY.register
class Constant(Schedule):
    """The same number at every step."""

    kind: Literal["constant"] = "constant"
    at: float

    def value(self, progress: Progress, state: State) -> float:
        return self.at

    def bounds(self) -> tuple[float, float]:
        return self.at, self.at


@REGISTRY.register
class Linear(_Ramp):
    """start + (end - start) x, where x is the share of the training done, divided by `until`, at most 1."""

    kind: Literal["linear"] = "linear"

    def value(self, progress: Progress, state: State) -> float:
        return self.start + (self.end - self.start) * self._along(progress)


@REGISTRY.register
class Cosine(_Ramp):
    """end + (start - end) (1 + cos(pi x)) / 2, with x as in `linear`."""

    kind: Literal["cosine"] = "cosine"

    def value(self, progress: Progress, state: State) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * self._along(progress)))


def _parse(value: Any) -> Any:
    if isinstance(value, dict):
        return REGISTRY.parse(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Schedule):
        raise PydanticCustomError(
            "scheduled_type", "should be a number, or a schedule such as {example}", _EXAMPLE
        )
    return value


_EXAMPLE = {"example": "{kind: linear, start: 0.0, end: 1.0}"}


def scheduled(least: float = -math.inf, greatest: float = math.inf) -> Any:
    """The annotation of a field: a float between `least` and `greatest`, or a schedule that stays there."""

    def check(value: float | Schedule) -> float | Schedule:
        low, high = value.bounds() if isinstance(value, Schedule) else (value, value)
        if low < least or high > greatest:
            shown = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            raise PydanticCustomError(
                "scheduled_range",
                "must stay between {least} and {greatest}, got {shown}",
                {"least": f"{least:g}", "greatest": f"{greatest:g}", "shown": shown},
            )
        return value

    return Annotated[float | SerializeAsAny[Schedule], AfterValidator(check), BeforeValidator(_parse)]


Share = scheduled(0.0, 1.0)
"""A number between 0 and 1, or a schedule."""

NonNegative = scheduled(0.0)
