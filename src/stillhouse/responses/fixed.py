"""The data set's own responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stillhouse.errors import DataError
from stillhouse.responses.base import REGISTRY, Context, ResponsesConfig, Stateless
from stillhouse.types import Progress, Prompt, Response


@REGISTRY.register
class Fixed(ResponsesConfig):
    """Train on the responses of the data set (off-policy; KD, SFT)."""

    kind: Literal["fixed"] = "fixed"
    unlabelled: Literal["refuse", "leave_out"] = "refuse"
    """What to do with rows that have no response: stop with an error, or train on the others."""

    def needs_reference(self) -> bool:
        """Yes."""
        return True

    def sources(self) -> frozenset[str]:
        """The data set only."""
        return frozenset({"fixed"})

    def usable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that have a response.

        Raises:
            DataError: some have none and `unlabelled` is "refuse", or none has one.
        """
        labelled = [prompt for prompt in prompts if prompt.response_ids is not None]
        missing = [prompt.id for prompt in prompts if prompt.response_ids is None]
        if missing and (self.unlabelled == "refuse" or not labelled):
            raise DataError(
                f"data.train: {len(missing):,} of {len(prompts):,} rows have no response, first {', '.join(missing[:3])}; "
                "this method trains on the data set's own responses. Add them, set responses.unlabelled: leave_out, or "
                "let the teacher write them (responses: {kind: generated, by: teacher})."
            )
        return labelled

    def build(self, context: Context) -> FixedPolicy:
        """The running policy."""
        return FixedPolicy()


class FixedPolicy(Stateless):
    """Hands out the data set's responses."""

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response for each prompt."""
        return [[reference(prompt)] for prompt in prompts]


def reference(prompt: Prompt) -> Response:
    """The data set's response to a prompt, which must have one."""
    assert prompt.response_ids is not None
    return Response(prompt, prompt.response_ids, "fixed", finished=prompt.response_finished)
