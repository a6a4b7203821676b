"""Schedules that follow what is measured: DistiLLM's share of student text, TAID's target, DistiLLM-2's
gaps."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from stillhouse.core.types import Progress
from stillhouse.schedules.base import REGISTRY, Schedule, State

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


@REGISTRY.register
class DevLoss(Schedule):
    """Rises by `step` whenever the loss on data.valid has become worse (DistiLLM's phi).

    Paper (Algorithm 1): phi <- min(phi + 1/N_phi, 1) if L_now > L_previous + eps. `against: last_rise` is the
    released code (commit d47e77f): L_now >= L_reference + eps, where the reference is replaced only when phi
    rises, so phi rises once for each eps of over-fitting added up since. The first validation, before
    training, gives the first reference in both.

    Example: `student_share: {kind: dev_loss, start: 0.0, step: 0.1, tolerance: 0.1, against: last_rise}`
    """

    kind: Literal["dev_loss"] = "dev_loss"
    start: Fraction = 0.0
    """The number before the first rise; phi_0."""
    step: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """How much one rise adds; 1 / N_phi."""
    tolerance: Annotated[float, Field(ge=0.0)] = 0.0
    """How much worse the loss may become without a rise (nats per token); eps."""
    against: Literal["last", "last_rise"] = "last"
    """What the loss is compared with: the validation before (paper), or the one of the last rise (code)."""
    greatest: Fraction = 1.0
    """It rises no higher than this."""

    def initial(self) -> State:
        return {"value": self.start}

    def observe(self, state: State, name: str, value: float, progress: Progress) -> State:
        if name != "dev_loss":
            return state
        reference = state.get("reference")
        if reference is None:
            return {**state, "reference": value}
        if self.against == "last_rise":
            worse = value >= reference + self.tolerance
            kept = value if worse else reference
        else:
            worse = value > reference + self.tolerance
            kept = value
        risen = min(self.greatest, state["value"] + self.step) if worse else state["value"]
        return {"value": max(risen, state["value"]), "reference": kept}

    def value(self, progress: Progress, state: State) -> float:
        return state["value"]

    def bounds(self) -> tuple[float, float]:
        return self.start, max(self.start, self.greatest)


@REGISTRY.register
class Momentum(Schedule):
    """Rises faster while the training loss falls, and never slower than in a straight line (TAID's t).

    With the step's loss L: delta = (L_before - L) / L_before, m <- beta m + (1 - beta) delta, and
    t <- min(end, max(start + (end - start) x, t + rate sigmoid(m) (1 - t))), x the share of the training
    done. Paper: Shing et al. 2025 (arXiv 2501.16937), section 3.3; released code at commit a062892.

    Example: `objective: {kind: taid, t: {kind: momentum, start: 0.4, end: 1.0}}`
    """

    kind: Literal["momentum"] = "momentum"
    start: Fraction = 0.4
    """The number at the first step."""
    end: Fraction = 1.0
    """The number at the last step at the latest."""
    rate: Annotated[float, Field(ge=0.0)] = 5e-4
    """The greatest rise of one step; alpha in the paper."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """How long the mean of the relative change of the loss remembers; beta in the paper."""

    def observe(self, state: State, name: str, value: float, progress: Progress) -> State:
        if name != "train_loss":
            return state
        before = state.get("loss")
        if before is None:
            return {**state, "loss": value}
        change = (before - value) / (before + 1e-15) if before > -1e-15 else 0.0
        mean = self.momentum * state.get("mean", 0.0) + (1 - self.momentum) * change
        now = self.value(progress, state)
        risen = now + self.rate * _sigmoid(mean) * (1 - now)
        return {"loss": value, "mean": mean, "value": min(self.end, risen)}

    def value(self, progress: Progress, state: State) -> float:
        line = self.start + (self.end - self.start) * progress.fraction
        return min(self.end, max(line, state.get("value", self.start)))

    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.end), self.end


@REGISTRY.register
class PreviousRound(Schedule):
    """The mean of what was measured during the pass over the prompts before this one (DistiLLM-2's m).

    The mean is over the optimiser steps of that pass; 0 during the first one, and never less than 0.

    Example: `objective: {kind: contrastive, alpha_rule: gap, teacher_gap: {kind: previous_round, of:
    teacher_gap}}`, for which `teacher_gap: previous_round` is short.
    """

    kind: Literal["previous_round"] = "previous_round"
    of: Literal["teacher_gap", "student_gap"]
    """What is measured at each step: the mean likelihood gap of teacher-written sequences (p - q) or of
    student-written ones (q - p)."""

    def observe(self, state: State, name: str, value: float, progress: Progress) -> State:
        if name != self.of:
            return state
        now = {"round": float(math.floor(progress.epoch)), "before": self.value(progress, state)}
        if state.get("round") != now["round"]:
            return {**now, "sum": value, "count": 1.0}
        return {**now, "sum": state["sum"] + value, "count": state["count"] + 1}

    def value(self, progress: Progress, state: State) -> float:
        if not state:
            return 0.0
        if math.floor(progress.epoch) > state["round"]:
            return max(0.0, state["sum"] / state["count"])
        return state["before"]

    def bounds(self) -> tuple[float, float]:
        return 0.0, math.inf


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
