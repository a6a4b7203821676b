"""Policies that let the student write for some steps and leave the others to another policy."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.core.requirements import STUDENT, Requirements, RunFacts
from stillhouse.engines.base import Sampling
from stillhouse.errors import Fault
from stillhouse.rollouts.base import ResponsesConfig, ResponsesField
from stillhouse.rollouts.fixed import Fixed


class OverBase(ResponsesConfig):
    """Text of the student for a share of the steps, `base` for the rest."""

    base: ResponsesField = Fixed()
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
        """Those that come whoever writes."""
        both: frozenset[str] = super().row_facts(sampling) & self.base.row_facts(sampling)
        return both

    def sources(self) -> frozenset[str]:
        """The student's and those of `base`."""
        return frozenset({"student"}) | self.base.sources()

    def sequences_per_prompt(self) -> int:
        """As many as `base`, if that is more than one."""
        return int(self.base.sequences_per_prompt())
