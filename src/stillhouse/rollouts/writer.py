"""A model that writes responses: an engine, with a name for who it is and a version for when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from stillhouse.core.types import Completion, Prompt, Response
from stillhouse.data.translate import Translator
from stillhouse.engines import shown
from stillhouse.engines.base import Engine, ProgressCall, Sampling


@dataclass(frozen=True)
class Writer:
    """Writes responses as the student or as the teacher."""

    engine: Engine
    source: Literal["student", "teacher"]
    sampling: Sampling
    """How it samples where a policy does not say otherwise."""
    version: Callable[[], int | None]
    """The optimiser step of the weights it writes with; None for the teacher."""
    fingerprint: Callable[[], str] = lambda: "unknown"
    """A digest of the weights it writes with."""
    by: str | None = None
    """How its texts are labelled; default: its source."""
    told: Callable[[int], None] | None = None
    """Told how many tokens each call has written."""
    translator: Translator | None = None
    """For a teacher with another tokenizer: it reads and writes its own tokens."""

    @property
    def name(self) -> str:
        """How its texts are labelled."""
        return self.by or self.source

    def settings(self, sampling: Sampling | None) -> Sampling:
        """`sampling`, or the writer's own; its length limit too, unless `sampling` sets one."""
        if sampling is None:
            return self.sampling
        if "max_tokens" in sampling.model_fields_set:
            return sampling
        return sampling.model_copy(update={"max_tokens": self.sampling.max_tokens})

    def write(
        self, prompts: Sequence[Prompt], seed: int, sampling: Sampling | None = None, title: str | None = None
    ) -> list[Response]:
        """One response for each prompt.

        Args:
            prompts: whom to answer; their token ids are used as they are.
            seed: the same seed gives the same text.
            sampling: instead of the writer's own.
            title: show progress under this title; None shows none.
        """
        settings = self.settings(sampling)
        completions = shown.generate(self.engine, self._ids(prompts), settings, seed, title)
        return self._responses(prompts, completions, settings)

    def write_some(
        self,
        prompts: Sequence[Prompt],
        numbers: Sequence[int],
        seed: int,
        sampling: Sampling | None = None,
        progress: ProgressCall | None = None,
    ) -> list[Response]:
        """Responses to some prompts of a larger set, the same as if the whole set were answered at once.

        Args:
            prompts: whom to answer.
            numbers: their places in the set.
            seed: that of the set.
            sampling: instead of the writer's own.
            progress: told how many responses are finished.
        """
        settings, ids = self.settings(sampling), self._ids(prompts)
        completions = self.engine.generate(ids, settings, seed, numbers=numbers, progress=progress)
        return self._responses(prompts, completions, settings)

    def _ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        if self.translator is None:
            return [prompt.token_ids for prompt in prompts]
        return [prompt.teacher_ids or prompt.token_ids for prompt in prompts]

    def _responses(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], sampling: Sampling
    ) -> list[Response]:
        if self.told is not None:
            self.told(sum(len(done.token_ids) for done in completions))
        if self.translator is not None:
            completions = [self.translator.to_student(done, sampling.max_tokens) for done in completions]
        version = self.version()
        return [
            Response(prompt, done.token_ids, self.source, done.finished, version, done.logprobs)
            for prompt, done in zip(prompts, completions, strict=True)
        ]
