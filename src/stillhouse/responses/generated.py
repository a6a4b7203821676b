"""Responses that one model writes: the teacher once (SeqKD), or the student afresh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stillhouse.engines.base import Sampling
from stillhouse.responses.base import REGISTRY, Context, ResponsesConfig, Stateless, derived_seed
from stillhouse.responses.rounds import Rounds
from stillhouse.responses.writer import Writer
from stillhouse.types import Progress, Prompt, Response


@REGISTRY.register
class Generated(ResponsesConfig):
    """Train on responses that the teacher or the student writes."""

    kind: Literal["generated"] = "generated"
    by: Literal["teacher", "student"] = "teacher"
    """Who writes."""
    refresh: Literal["never", "epoch", "step"] = "never"
    """When to write anew: once before training, at the start of each epoch, or at each step (on-policy)."""
    sampling: Sampling | None = None
    """How the writer samples; default: `engine.sampling`."""

    def writers(self) -> frozenset[str]:
        """The one who writes."""
        return frozenset({self.by})

    def sources(self) -> frozenset[str]:
        """The one who writes."""
        return frozenset({self.by})

    def build(self, context: Context) -> GeneratedPolicy:
        """The running policy."""
        writer = context.student if self.by == "student" else context.teacher
        assert writer is not None
        return GeneratedPolicy(context, writer, self.refresh, self.sampling)


class GeneratedPolicy(Stateless):
    """Keeps the newest round of one writer, or writes for the step's prompts alone."""

    def __init__(self, context: Context, writer: Writer, refresh: str, sampling: Sampling | None) -> None:
        self._seed = context.seed
        self._writer = writer
        self._refresh = refresh
        self._sampling = sampling
        self._rounds = Rounds(context, writer, sampling)

    def draw(self, now: Any, prompts: Sequence[Prompt], progress: Progress) -> list[list[Response]]:
        """One response for each prompt."""
        return [[response] for response in self.one_each(prompts, progress)]

    def one_each(self, prompts: Sequence[Prompt], progress: Progress) -> list[Response]:
        """The writer's response to each prompt, from the round or fresh."""
        if self._refresh == "step":
            seed = derived_seed(self._seed, self._writer.source, "step", progress.step)
            return self._writer.write(prompts, seed, self._sampling)
        number = int(progress.epoch) if self._refresh == "epoch" else 0
        written = self._rounds.responses(number)
        return [written[prompt.id] for prompt in prompts]
