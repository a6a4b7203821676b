"""A model that generates responses: an engine, whose weights it holds, and how it samples by default."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from stillhouse.core.types import Completion, Prompt, Response, images_of
from stillhouse.data.translate import Translator
from stillhouse.engines.base import Engine, ProgressCallback, Sampling

logger = logging.getLogger("stillhouse")


@dataclass(frozen=True)
class ResponseGenerator:
    """Generates responses as the student or as the teacher."""

    engine: Engine
    source: Literal["student", "teacher"]
    sampling: Sampling
    """The default, for policies that set none of their own."""
    version: Callable[[], int | None]
    """The optimiser step of the weights it generates with; None for the teacher."""
    fingerprint: Callable[[], str] = lambda: "unknown"
    """A digest of the weights it generates with."""
    label: str | None = None
    """How its responses are labelled; default: `source`."""
    on_tokens: Callable[[int], None] | None = None
    """Called with the number of tokens that each call has generated."""
    translator: Translator | None = None
    """For a teacher with another tokenizer, which reads and generates its own tokens."""
    end_id: int | None = None
    """The student's end of a response, which takes the place of the teacher's own; None: nothing does."""
    vocab: int | None = None
    """Number of the student's token ids; tokens beyond, of a teacher that has more, are left out."""

    @property
    def name(self) -> str:
        """How its responses are labelled."""
        return self.label or self.source

    def resolve_sampling(self, sampling: Sampling | None) -> Sampling:
        """`sampling`, or the default; with the default's length limit unless `sampling` sets one."""
        if sampling is None:
            return self.sampling
        if "max_tokens" in sampling.model_fields_set:
            return sampling
        return sampling.model_copy(update={"max_tokens": self.sampling.max_tokens})

    def generate(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        sampling: Sampling | None = None,
        *,
        sample_ids: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
        counted: bool = True,
    ) -> list[Response]:
        """One response for each prompt, in the order of the prompts.

        Args:
            prompts: their token ids are used as they are.
            seed: the same seed and weights give the same responses.
            sampling: instead of the default.
            sample_ids: see `Engine.generate`: places in a larger set of which these prompts are a part. Each
                response is then the same as if the whole set had been generated at once.
            progress: called with the number of finished responses.
            counted: whether `on_tokens` is told; otherwise the caller tells it.
        """
        if not prompts:
            return []
        resolved = self.resolve_sampling(sampling)
        completions = self.engine.generate(
            self._prompt_ids(prompts),
            resolved,
            seed,
            sample_ids=sample_ids,
            progress=progress,
            images=images_of(prompts),
        )
        if counted and self.on_tokens is not None:
            self.on_tokens(sum(len(completion.token_ids) for completion in completions))
        return self._responses(prompts, completions, resolved)

    def _prompt_ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        if self.source != "teacher":
            return [prompt.token_ids for prompt in prompts]
        return [prompt.teacher_ids or prompt.token_ids for prompt in prompts]

    def _responses(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], sampling: Sampling
    ) -> list[Response]:
        if self.translator is not None:
            completions = [self.translator.to_student(one, sampling.max_tokens) for one in completions]
        completions = [self._as_the_student_ends(one) for one in completions]
        version = self.version()
        return [
            Response(prompt, one.token_ids, self.source, one.finished, version, one.logprobs)
            for prompt, one in zip(prompts, completions, strict=True)
        ]

    def _as_the_student_ends(self, completion: Completion) -> Completion:
        """A completion of the teacher with the student's end token, and without tokens that it lacks."""
        ids, logprobs = completion.token_ids, completion.logprobs
        if completion.finished and self.end_id is not None:
            ids = (*ids[:-1], self.end_id)
        if self.vocab is not None and max(ids) >= self.vocab:
            kept = [place for place, token in enumerate(ids) if token < self.vocab]
            logger.warning(
                "Text of the %s: %d tokens that the student does not have are left out.",
                self.name,
                len(ids) - len(kept),
            )
            if not kept:
                return Completion((self.end_id,) if self.end_id is not None else ids, True)
            ids = tuple(ids[place] for place in kept)
            logprobs = None if logprobs is None else tuple(logprobs[place] for place in kept)
        return replace(completion, token_ids=ids, logprobs=logprobs)
