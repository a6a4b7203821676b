"""Student-written responses for a share of the steps, another policy for the rest (GKD, ImitKD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stillhouse.core.requirements import STUDENT, Requirements
from stillhouse.core.seeds import derived_uniform
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import REGISTRY, ResponsePolicy, ResponsesConfig, RolloutContext
from stillhouse.rollouts.over import OverBase
from stillhouse.schedules import Share


@REGISTRY.register
class Mixed(OverBase):
    """With probability `student_share` a step trains on what the student writes now, else on `base`."""

    kind: Literal["mixed"] = "mixed"
    student_share: Share = 0.5
    """Probability that a step is on-policy (lambda in GKD; 1 is fully on-policy)."""

    def sources(self) -> frozenset[str]:
        """The student's, and those of `base` unless it is never used."""
        return frozenset({"student"}) if self.student_share == 1 else super().sources()

    def requirements(self) -> Requirements:
        """The student's text, and what `base` needs unless it is never used."""
        return Requirements.of(STUDENT, "text") if self.student_share == 1 else super().requirements()

    def row_facts(self, sampling: Sampling) -> frozenset[str]:
        """Those that come whoever writes."""
        if self.student_share == 1:
            return ResponsesConfig.row_facts(self, sampling)
        return super().row_facts(sampling)

    def build(self, context: RolloutContext) -> MixedPolicy:
        """The running policy."""
        assert context.student is not None
        return MixedPolicy(context, self.base.build(context), self.sampling)


class MixedPolicy:
    """One draw for each step, the same on all ranks."""

    def __init__(self, context: RolloutContext, base: ResponsePolicy, sampling: Sampling | None) -> None:
        assert context.student is not None
        self._student = context.student
        self._seed = context.seed
        self._generation_seed = context.generation_seed
        self._base = base
        self._sampling = sampling
        self._on_policy = False

    def draw(self, now: Mixed, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response for each prompt, all from the same source."""
        assert isinstance(now.student_share, float | int)
        self._on_policy = derived_uniform(self._seed, "mixed", progress.step) < now.student_share
        if not self._on_policy:
            return self._base.draw(now.base, prompts, progress)
        seed = self._generation_seed("mixed-text", progress.step)
        return [[response] for response in self._student.generate(prompts, seed, self._sampling)]

    def metrics(self) -> dict[str, float]:
        """Whether the step was on-policy."""
        return {**self._base.metrics(), "responses/on_policy": float(self._on_policy)}

    def state_dict(self) -> dict[str, Any]:
        """What `base` has to save; the draws themselves depend on the step alone."""
        return {"base": self._base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._base.load_state_dict(state["base"])
