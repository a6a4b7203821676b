"""Student-generated responses for a share of the steps, another policy for the rest (GKD, ImitKD)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from stillhouse.config import because
from stillhouse.core.requirements import STUDENT, Requirements, RunFacts
from stillhouse.core.seeds import derived_uniform
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.errors import Fault
from stillhouse.rollouts.base import (
    REGISTRY,
    ResponsePolicy,
    ResponsesConfig,
    ResponsesField,
    RolloutContext,
)
from stillhouse.rollouts.fixed import FixedConfig
from stillhouse.schedules import Share


class StudentShareConfig(ResponsesConfig):
    """Student-generated responses for a share of the steps, `base` for the rest."""

    base: ResponsesField = FixedConfig()
    """Where the other responses come from: the data set, or `{kind: generated, by: teacher}`."""
    sampling: Sampling | None = None
    """How the student samples; default: `engine.sampling`."""

    def requirements(self) -> Requirements:
        """The student's text, and what `base` needs."""
        needs: Requirements = self.base.requirements()
        return Requirements.of(STUDENT, "text") | needs

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        """What is wrong with `base`."""
        yield from self.base.check_in_run(f"{path}.base", facts)

    def row_facts(self, sampling: Sampling) -> frozenset[str]:
        """Those of responses from either source."""
        both: frozenset[str] = super().row_facts(sampling) & self.base.row_facts(sampling)
        return both

    def sources(self) -> frozenset[str]:
        """The student's and those of `base`."""
        return frozenset({"student"}) | self.base.sources()

    def generated_responses(self, prompts: int, steps: int, batch_size: int) -> dict[str, int]:
        """The student's in its share of the steps, in all where that is a schedule; and those of `base`."""
        share = getattr(self, "student_share", 1.0)
        own = math.ceil(steps * share) if isinstance(share, int | float) else steps
        base: dict[str, int] = self.base.generated_responses(prompts, steps, batch_size)
        return base | ({"student": own * batch_size} if own else {})

    def follows_schedule(self) -> bool:
        """Whether the share of the steps is one."""
        return not isinstance(getattr(self, "student_share", 1.0), int | float)

    def sequences_per_prompt(self) -> int:
        """As many as `base`, if that is more than one."""
        return int(self.base.sequences_per_prompt())


@REGISTRY.register
class MixedConfig(StudentShareConfig):
    """With probability `student_share` a step trains on what the student generates now, else on `base`."""

    kind: Literal["mixed"] = "mixed"
    student_share: Share = 0.5
    """Probability that a step is on-policy (lambda in GKD; 1 is fully on-policy)."""

    def options_without_effect(self) -> dict[str, str]:
        if self.student_share == 1:
            return because("student_share is 1", "base")
        return because("student_share is 0", "sampling") if self.student_share == 0 else {}

    def sources(self) -> frozenset[str]:
        """The student's, and those of `base` unless it is never used."""
        return frozenset({"student"}) if self.student_share == 1 else super().sources()

    def requirements(self) -> Requirements:
        """The student's text, and what `base` needs unless it is never used."""
        return Requirements.of(STUDENT, "text") if self.student_share == 1 else super().requirements()

    def row_facts(self, sampling: Sampling) -> frozenset[str]:
        """Those of responses from either source, unless `base` is never used."""
        if self.student_share == 1:
            return ResponsesConfig.row_facts(self, sampling)
        return super().row_facts(sampling)

    def build(self, context: RolloutContext) -> MixedPolicy:
        """The running policy."""
        assert context.student is not None
        return MixedPolicy(context, self.base.build(context), self.sampling)


class MixedPolicy:
    """Decides each step at random, the same on all ranks."""

    def __init__(self, context: RolloutContext, base: ResponsePolicy, sampling: Sampling | None) -> None:
        self._context = context
        self._base = base
        self._sampling = sampling
        self._on_policy = False

    def draw(self, now: MixedConfig, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response to each prompt, all from the same source."""
        assert isinstance(now.student_share, float | int)
        self._on_policy = derived_uniform(self._context.seed, "mixed", progress.step) < now.student_share
        if not self._on_policy:
            return self._base.draw(now.base, prompts, progress)
        assert self._context.student is not None
        purpose = ("mixed-text", progress.step)
        written = self._context.write(self._context.student, prompts, self._sampling, *purpose)
        return [[response] for response in written]

    def metrics(self) -> dict[str, float]:
        """Whether the step was on-policy, and the metrics of `base`."""
        return {**self._base.metrics(), "responses/on_policy": float(self._on_policy)}

    def state_dict(self) -> dict[str, Any]:
        """The state of `base`; the decisions depend on the step alone."""
        return {"base": self._base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._base.load_state_dict(state["base"])

    def dealt_out(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """That of `base`."""
        return {"base": self._base.dealt_out([state["base"] for state in states])}
