"""The data set's responses with their chain of thought, and the bare answers of the same rows."""

from __future__ import annotations

from typing import Literal

from stillhouse.core.requirements import Requirements
from stillhouse.core.types import Prompt, Response
from stillhouse.rollouts.base import REGISTRY, ResponsesConfig, RolloutContext
from stillhouse.rollouts.preference_pairs import DataPairsPolicy, pairs_of_data


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
        return [chain for chain, _ in pairs_of_data(context.prompts, Prompt.chain_and_answer)]

    def sources(self) -> frozenset[str]:
        """The response of the data set, and its answer alone."""
        return frozenset({"fixed", "direct"})

    def build(self, context: RolloutContext) -> DataPairsPolicy:
        """The running policy."""
        return DataPairsPolicy(Prompt.chain_and_answer)
