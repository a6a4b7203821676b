"""The data set's own responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stillhouse.core.requirements import Requirements
from stillhouse.core.types import Progress, Prompt, Response
from stillhouse.rollouts.base import REGISTRY, ResponsesConfig, RolloutContext, StatelessPolicy


@REGISTRY.register
class FixedConfig(ResponsesConfig):
    """Train on the responses of the data set (off-policy; KD, SFT)."""

    kind: Literal["fixed"] = "fixed"

    def requirements(self) -> Requirements:
        """Responses of the data set."""
        return Requirements(data=frozenset({"responses"}))

    def sources(self) -> frozenset[str]:
        """The data set only."""
        return frozenset({"fixed"})

    def build(self, context: RolloutContext) -> FixedPolicy:
        """The running policy."""
        return FixedPolicy()


class FixedPolicy(StatelessPolicy):
    """Provides the data set's responses."""

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response to each prompt."""
        return [[reference_response(prompt)] for prompt in prompts]


def reference_response(prompt: Prompt) -> Response:
    """The data set's response to a prompt, which must have one."""
    response = prompt.reference_response()
    assert response is not None
    return response
