"""DistiLLM-2's beta: the weight of student-generated responses over the training."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from stillhouse.config import because
from stillhouse.core.types import Progress
from stillhouse.schedules.base import REGISTRY, Schedule, State


@REGISTRY.register
class GradualBeta(Schedule):
    """DistiLLM-2's weight of student-generated responses, which grows during training; beta.

    - `rule: paper`: clip(x, start, 1), x the fraction of the training done: `start` for the first half, then
      up to 1. What Algorithm 1, line 13 means.
    - `rule: printed`: clip(e / E + tau / T, start, 1), that line to the letter: epoch e of E, counted from 1,
      iteration tau of the T of an epoch. It reaches 1 within each epoch and starts the next one lower.
    - `rule: released`: start (1 + min(1, 2 x) / 2): from `start` to 1.5 `start` over the first half, as in
      the released code (commit fe4cf9b), where it is switched off.

    Source: Ko et al. 2025, DistiLLM-2 (arXiv 2503.07067).

    Example: `objective: {kind: contrastive, student_share: {kind: gradual_beta, rule: paper}}`
    """

    kind: Literal["gradual_beta"] = "gradual_beta"
    rule: Literal["paper", "printed", "released"] = "paper"
    """Which of the three formulas."""
    start: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """The value at the first step; beta_0."""

    def value(self, progress: Progress, state: State) -> float:
        if self.rule == "released":
            return min(1.0, self.start * (1 + 0.5 * min(1.0, 2 * progress.fraction)))
        if self.rule == "paper":
            return max(self.start, progress.fraction)
        done = math.floor(progress.epoch)
        return min(1.0, max(self.start, (done + 1) / progress.epochs + progress.epoch - done))

    def options_without_effect(self) -> dict[str, str]:
        return because("start is 1", "rule") if self.start == 1 else {}

    def bounds(self) -> tuple[float, float]:
        return self.start, min(1.0, 1.5 * self.start) if self.rule == "released" else 1.0
