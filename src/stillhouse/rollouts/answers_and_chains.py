"""The data set's responses with their chain of thought, and the bare answers of the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stillhouse.core.requirements import Requirements
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.rollouts.base import REGISTRY, ResponsesConfig, RolloutContext, StatelessPolicy


@REGISTRY.register
class AnswersAndChainsConfig(ResponsesConfig):
    """Train on each row twice: on its response with the chain of thought (source `fixed`), and on the answer
    alone (source `direct`), beside which the teacher reads the response with the chain.

    Paper: CoT2Align (arXiv 2502.16806).
    """

    kind: Literal["answers_and_chains"] = "answers_and_chains"

    def requirements(self) -> Requirements:
        """Rows with reasoning before their answer."""
        return Requirements(data=frozenset({"responses", "reasoning"}))

    def sequences_per_prompt(self) -> int:
        """Two."""
        return 2

    def known_responses(self, context: RolloutContext) -> list[Response]:
        """Those with the chain: what the teacher reads."""
        return [chain for chain, _ in map(_both, context.prompts)]

    def sources(self) -> frozenset[str]:
        """The response of the data set, and its answer alone."""
        return frozenset({"fixed", "direct"})

    def build(self, context: RolloutContext) -> AnswersAndChainsPolicy:
        """The running policy."""
        return AnswersAndChainsPolicy()


class AnswersAndChainsPolicy(StatelessPolicy):
    """Provides both responses of the data set's rows."""

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """The response with the chain and the answer alone to each prompt."""
        return [[*_both(prompt)] for prompt in prompts]


def _both(prompt: Prompt) -> tuple[Response, Response]:
    chain, direct = prompt.reference_response(), prompt.direct_response()
    assert chain is not None
    assert direct is not None
    return chain, direct
