"""The preference pairs of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stillhouse.core.requirements import Requirements
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import REGISTRY, ResponsesConfig, RolloutContext, StatelessPolicy


@REGISTRY.register
class PreferencePairsConfig(ResponsesConfig):
    """Train on the chosen and the rejected response of each row. Where the objective compares them, the two
    of a row are in one micro-batch."""

    kind: Literal["preference_pairs"] = "preference_pairs"

    def requirements(self) -> Requirements:
        """Rows that are preference pairs."""
        return Requirements(data=frozenset({"responses", "rejected"}))

    def row_facts(self, sampling: Sampling) -> frozenset[str]:
        """Which responses belong together."""
        return frozenset({"pairs"})

    def sequences_per_prompt(self) -> int:
        """Two."""
        return 2

    def known_responses(self, context: RolloutContext) -> list[Response]:
        """Both responses of all pairs."""
        return [response for group in _pairs(context.prompts) for response in group]

    def sources(self) -> frozenset[str]:
        """The two of a pair."""
        return frozenset({"chosen", "rejected"})

    def build(self, context: RolloutContext) -> PreferencePairsPolicy:
        """The running policy."""
        return PreferencePairsPolicy()


class PreferencePairsPolicy(StatelessPolicy):
    """Provides the pairs of the data set."""

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """The chosen and the rejected response to each prompt."""
        return _pairs(prompts)


def _pairs(prompts: Sequence[Prompt]) -> list[list[Response]]:
    """The chosen and the rejected response to each prompt, which must be pairs."""
    found = []
    for prompt in prompts:
        pair = prompt.preference_pair()
        assert pair is not None
        found.append([*pair])
    return found
