"""A number that may move: either a float or a schedule that gives one at each step."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from stillhouse.config import Registry, StrictConfig
from stillhouse.core.types import Progress

State = dict[str, float]


class Schedule(StrictConfig):
    """Gives a number from the progress and, for adaptive ones, from what was observed.

    A schedule is frozen; what it remembers is a plain dictionary that the curriculum keeps and saves.
    """

    def initial(self) -> State:
        """What it remembers before the first step."""
        return {}

    def observe(self, state: State, name: str, value: float, progress: Progress) -> State:
        """The state after `name` was measured as `value`, at `progress`: "dev_loss", "train_loss",
        "teacher_gap", "student_gap".

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


@REGISTRY.register
class GradualBeta(Schedule):
    """DistiLLM-2's weight of student-written text, which grows during the training; beta.

    - `rule: paper`: clip(x, start, 1), x the share of the training done: `start` for the first half, then up
      to 1. What Algorithm 1, line 13 means.
    - `rule: printed`: clip(e / E + tau / T, start, 1), that line to the letter: epoch e of E, counted from 1,
      iteration tau of the T of an epoch. It reaches 1 within each epoch and starts the next one lower.
    - `rule: released`: start (1 + min(1, 2 x) / 2): from `start` to half as much again over the first half,
      as in the released code (commit fe4cf9b), where it is switched off.

    Source: Ko et al. 2025, DistiLLM-2 (arXiv 2503.07067).

    Example: `objective: {kind: contrastive, student_share: {kind: gradual_beta, rule: paper}}`
    """

    kind: Literal["gradual_beta"] = "gradual_beta"
    rule: Literal["paper", "printed", "released"] = "paper"
    """Which of the three."""
    start: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """The share at the beginning; beta_0."""

    def value(self, progress: Progress, state: State) -> float:
        if self.rule == "released":
            return min(1.0, self.start * (1 + 0.5 * min(1.0, 2 * progress.fraction)))
        if self.rule == "paper":
            return max(self.start, progress.fraction)
        done = math.floor(progress.epoch)
        return min(1.0, max(self.start, (done + 1) / progress.epochs + progress.epoch - done))

    def bounds(self) -> tuple[float, float]:
        return self.start, min(1.0, 1.5 * self.start) if self.rule == "released" else 1.0


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
