"""Policies that let the student write for some steps and leave the others to another policy."""

from __future__ import annotations

from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import ResponsesConfig, ResponsesField
from stillhouse.rollouts.fixed import Fixed


class OverBase(ResponsesConfig):
    """Text of the student for a share of the steps, `base` for the rest."""

    base: ResponsesField = Fixed()
    """Where the other responses come from: the data set, or `{kind: generated, by: teacher}`."""
    sampling: Sampling | None = None
    """How the student samples; default: `engine.sampling`."""

    def writers(self) -> frozenset[str]:
        """The student, and whoever writes for `base`."""
        return frozenset({"student"}) | self.base.writers()

    def sources(self) -> frozenset[str]:
        """The student's and those of `base`."""
        return frozenset({"student"}) | self.base.sources()

    def needs_reference(self) -> bool:
        """As `base` does."""
        return bool(self.base.needs_reference())

    def needs(self) -> frozenset[str]:
        """As `base` does."""
        return frozenset(self.base.needs())

    def together(self) -> bool:
        """As `base` does."""
        return bool(self.base.together())

    def mixes_tokens(self) -> bool:
        """As `base` does."""
        return bool(self.base.mixes_tokens())

    def sequences_per_prompt(self) -> int:
        """As many as `base`, if that is more than one."""
        return int(self.base.sequences_per_prompt())
