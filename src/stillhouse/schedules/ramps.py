"""Schedules of the training progress alone: constant, linear, cosine."""

from __future__ import annotations

import math
from typing import Literal

from stillhouse.config import because
from stillhouse.core.types import Progress
from stillhouse.schedules.base import REGISTRY, Schedule, State


@REGISTRY.register
class Constant(Schedule):
    """The same value at every step."""

    kind: Literal["constant"] = "constant"
    at: float
    """The value."""

    def value(self, progress: Progress, state: State) -> float:
        return self.at

    def bounds(self) -> tuple[float, float]:
        return self.at, self.at


class _Ramp(Schedule):
    start: float
    """The value at the first step."""
    end: float
    """The value from `until` on."""
    until: float = 1.0
    """Fraction of the training after which `end` is reached."""

    def options_without_effect(self) -> dict[str, str]:
        return because("start is end", "until") if self.start == self.end else {}

    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)

    def _fraction(self, progress: Progress) -> float:
        return min(1.0, progress.fraction / self.until) if self.until > 0 else 1.0


@REGISTRY.register
class Linear(_Ramp):
    """start + (end - start) x, where x = min(1, fraction of the training done / until)."""

    kind: Literal["linear"] = "linear"

    def value(self, progress: Progress, state: State) -> float:
        return self.start + (self.end - self.start) * self._fraction(progress)


@REGISTRY.register
class Cosine(_Ramp):
    """end + (start - end) (1 + cos(pi x)) / 2, with x as in `linear`."""

    kind: Literal["cosine"] = "cosine"

    def value(self, progress: Progress, state: State) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * self._fraction(progress)))
