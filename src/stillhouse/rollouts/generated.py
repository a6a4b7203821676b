"""Responses that one model writes: the teacher once (SeqKD), or the student afresh."""

from __future__ import annotations

from typing import Literal

from stillhouse.core.requirements import MAIN, STUDENT, Requirements
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import REGISTRY, RolloutContext
from stillhouse.rollouts.offline.policy import InRounds, RoundsPolicy
from stillhouse.rollouts.offline.side import Side


@REGISTRY.register
class Generated(InRounds):
    """Train on responses that the teacher or the student writes.

    Example: `responses: {kind: generated, by: teacher, filters: [empty, truncated]}`
    """

    kind: Literal["generated"] = "generated"
    by: Literal["teacher", "student"] = "teacher"
    """Who writes."""
    refresh: Literal["never", "epoch", "step"] = "never"
    """When to write anew: once before training, at the start of each epoch, or at each step (on-policy)."""
    sampling: Sampling | None = None
    """How the writer samples; default: `engine.sampling`."""

    def requirements(self) -> Requirements:
        """Text of the one who generates, and what the filters need."""
        return super().requirements() | Requirements.of(STUDENT if self.by == "student" else MAIN, "text")

    def sources(self) -> frozenset[str]:
        """The one who writes."""
        return frozenset({self.by})

    def build(self, context: RolloutContext) -> RoundsPolicy:
        """The running policy."""
        return RoundsPolicy(self, context, {self.by: self._side(context)})

    def teacher_side_of(self, context: RolloutContext) -> Side | None:
        """Its one side, if the teacher writes it once."""
        return self._side(context) if self.by == "teacher" and self.refresh == "never" else None

    def _side(self, context: RolloutContext) -> Side:
        writer = context.student if self.by == "student" else context.teacher
        assert writer is not None
        return Side(context, self.by, writer, self.refresh, self.sampling, self.setting(context, self.by))
