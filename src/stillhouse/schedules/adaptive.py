"""Schedules driven by metrics: DistiLLM's share of student-generated text, TAID's t, DistiLLM-2's gaps."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from stillhouse.config import because
from stillhouse.core.requirements import Requirements
from stillhouse.core.types import Progress
from stillhouse.schedules.base import REGISTRY, Schedule, State

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


@REGISTRY.register
class DevLoss(Schedule):
    """Rises by `step` whenever the validation loss (on data.valid) has got worse; DistiLLM's phi.

    Paper (Algorithm 1): phi <- min(phi + 1/N_phi, 1) if L_now > L_previous + eps. `against: last_rise` is the
    released code (commit d47e77f): L_now >= L_reference + eps, where the reference is updated only when phi
    rises, so phi rises once for each eps of accumulated overfitting. In both, the first reference is the
    validation before training.

    Example: `student_share: {kind: dev_loss, start: 0.0, step: 0.1, tolerance: 0.1, against: last_rise}`
    """

    kind: Literal["dev_loss"] = "dev_loss"
    start: Fraction = 0.0
    """The value before the first rise; phi_0."""
    step: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Added at each rise; 1 / N_phi."""
    tolerance: Annotated[float, Field(ge=0.0)] = 0.0
    """Increase of the loss (nats per token) that does not yet cause a rise; eps."""
    against: Literal["last", "last_rise"] = "last"
    """The reference: the previous validation (paper), or that of the last rise (released code)."""
    maximum: Fraction = 1.0
    """Upper limit."""

    def requirements(self) -> Requirements:
        return Requirements(measured=frozenset({"dev_loss"}))

    def options_without_effect(self) -> dict[str, str]:
        still = ("step", "tolerance", "against")
        if self.start == 1:
            return because("start is 1", "maximum", *still)
        return because("start is the maximum", *still) if self.maximum <= self.start else {}

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
        risen = min(self.maximum, state["value"] + self.step) if worse else state["value"]
        return {"value": max(risen, state["value"]), "reference": kept}

    def value(self, progress: Progress, state: State) -> float:
        return state["value"]

    def bounds(self) -> tuple[float, float]:
        return self.start, max(self.start, self.maximum)


@REGISTRY.register
class Momentum(Schedule):
    """Rises faster while the training loss falls, and at least linearly; TAID's t.

    With the step's loss L: delta = (L_before - L) / L_before, m <- beta m + (1 - beta) delta, and
    t <- min(end, max(start + (end - start) x, t + rate sigmoid(m) (1 - t))), x the fraction of the
    training done. Paper: Shing et al. 2025 (arXiv 2501.16937), section 3.3; released code at commit a062892.

    Example: `objective: {kind: taid, t: {kind: momentum, start: 0.4, end: 1.0}}`
    """

    kind: Literal["momentum"] = "momentum"
    start: Fraction = 0.4
    """The value at the first step."""
    end: Fraction = 1.0
    """Upper limit, reached at the last step at the latest."""
    rate: Annotated[float, Field(ge=0.0)] = 5e-4
    """Maximum rise per step; alpha in the paper."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    """Decay of the running mean of the relative change of the loss; beta in the paper."""

    def requirements(self) -> Requirements:
        return Requirements(measured=frozenset({"train_loss"}))

    def options_without_effect(self) -> dict[str, str]:
        if self.start >= self.end:
            return because("start is not below end", "rate", "momentum")
        return because("rate is 0", "momentum") if self.rate == 0 else {}

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
    """The mean of a metric over the optimiser steps of the previous epoch; DistiLLM-2's m.

    0 during the first epoch, and clipped at 0 below.

    Example: `objective: {kind: contrastive, alpha_rule: gap, teacher_gap: {kind: previous_round, of:
    teacher_gap}}`; `teacher_gap: previous_round` is a shorthand for it.
    """

    kind: Literal["previous_round"] = "previous_round"
    of: Literal["teacher_gap", "student_gap"]
    """The metric: the mean likelihood gap of teacher-generated sequences (p - q) or of student-generated
    ones (q - p)."""

    def requirements(self) -> Requirements:
        return Requirements(measured=frozenset({self.of}))

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
