"""The preference pairs of the data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from stillhouse.core.requirements import Requirements
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.engines.base import Sampling
from stillhouse.rollouts.base import REGISTRY, ResponsesConfig, RolloutContext, StatelessPolicy

PairOf = Callable[[Prompt], tuple[Response, Response] | None]
"""Two responses of the data set to a prompt; None where it has no two."""


@REGISTRY.register
class PreferencePairsConfig(ResponsesConfig):
    """Train on the chosen and the rejected response of each row. Where the objective compares them, the two
    of a row are in one micro-batch."""

    kind: Literal["preference_pairs"] = "preference_pairs"
    swap: bool = False
    """Take the rejected response for the chosen one and the other way round, for the reverse teacher of
    AlignDistil (reverse DPO)."""

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
        return [one for pair in pairs_of_data(context.prompts, self._pair_of) for one in pair]

    def sources(self) -> frozenset[str]:
        """The two of a pair."""
        return frozenset({"chosen", "rejected"})

    def build(self, context: RolloutContext) -> DataPairsPolicy:
        """The running policy."""
        return DataPairsPolicy(self._pair_of)

    @property
    def _pair_of(self) -> PairOf:
        return _swapped_pair if self.swap else Prompt.preference_pair


class DataPairsPolicy(StatelessPolicy):
    """Provides two responses of the data set to each prompt."""

    def __init__(self, pair_of: PairOf) -> None:
        """With what finds the two, which every prompt must have."""
        self._pair_of = pair_of

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """The two responses to each prompt."""
        return pairs_of_data(prompts, self._pair_of)


def _swapped_pair(prompt: Prompt) -> tuple[Response, Response] | None:
    return prompt.swapped().preference_pair()


def pairs_of_data(prompts: Sequence[Prompt], pair_of: PairOf) -> list[list[Response]]:
    """The two responses to each prompt, which must have them."""
    found = []
    for prompt in prompts:
        pair = pair_of(prompt)
        assert pair is not None
        found.append([*pair])
    return found
