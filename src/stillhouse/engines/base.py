"""What every engine takes and gives; imports no model library."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from pydantic import Field

from stillhouse.config import Registry, StrictConfig
from stillhouse.core.types import Completion

ProgressCall = Callable[[int, int], None]
"""Told (completions finished, completions in all), now and then."""


class Sampling(StrictConfig):
    """How the next token is drawn from the model's logits.

    The settings act in this order, each as the logits processor of that name in transformers:
    repetition_penalty, no_repeat_ngram_size, min_tokens, temperature, top_k, top_p, min_p.
    Text ends with an end-of-sequence token or at `max_tokens`.

    Example: `Sampling(temperature=0.8, top_p=0.95, max_tokens=256)`
    """

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Logits are divided by it. 0 is greedy: the most likely token, and top_k, top_p, min_p do nothing."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the k most likely tokens and those that tie with the last of them; 0 is all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw from the fewest most likely tokens that together have at least this probability; 1 is all."""
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Draw from tokens with at least this share of the most likely token's probability; 0 is all."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Length limit of a response, the end-of-sequence token included."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """The end-of-sequence token is not drawn before this many tokens have been."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """No n-gram of this size occurs twice in prompt and response together; 0 allows all."""
    repetition_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """Logits of tokens in prompt or response are divided by it if positive, multiplied if negative."""
    logprobs: bool = False
    """Also return the log-probability (nats) of each token under the distribution it was drawn from.

    With temperature 0 that is the model's own distribution after penalties and bans.
    """


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """All that an engine has to know of a tokenizer.

    Example: `TokenizerFacts(eos_ids=(2,), pad_id=2)`
    """

    eos_ids: tuple[int, ...]
    """Tokens that end a response."""
    pad_id: int
    """Fills the left of shorter prompts; it is masked, so any valid id does."""
    tokenizer: Any = field(default=None, repr=False, compare=False)
    """The tokenizer itself: for engines that meet text, those that ask servers, and for `vocab`."""

    @property
    def vocab(self) -> int | None:
        """How many ids there are; the rows of a higher head are padding, which is never drawn. None: all."""
        return None if self.tokenizer is None else len(self.tokenizer)

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerFacts:
        """The facts of a transformers tokenizer."""
        eos = tokenizer.eos_token_id
        eos_ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
        pad = tokenizer.pad_token_id
        return cls(eos_ids, pad if pad is not None else (eos_ids[0] if eos_ids else 0), tokenizer)


class Finished:
    """Collects completions in whatever order they finish, and tells how many there are."""

    def __init__(self, total: int, progress: ProgressCall | None) -> None:
        self._total = total
        self._progress = progress
        self._done: dict[int, Completion] = {}

    def __call__(self, index: int, completion: Completion) -> None:
        """The completion of prompt number `index` is finished."""
        self._done[index] = completion
        if self._progress is not None:
            self._progress(len(self._done), self._total)

    def in_order(self) -> list[Completion]:
        """All of them, in the order of the prompts."""
        return [self._done[index] for index in range(self._total)]


class Engine(Protocol):
    """Writes completions for prompts."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        numbers: Sequence[int] | None = None,
        progress: ProgressCall | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in the order of the prompts.

        Args:
            prompts: token ids, each at least one, not padded. Equal prompts get texts of their own.
            sampling: how tokens are drawn.
            seed: the same prompts, weights and seed give the same text.
            numbers: what tells prompts apart: a prompt's random numbers depend on the seed and on its number
                alone. By default its place in `prompts`; whoever asks for some of a larger set gives their
                places in that, and gets the text that asking for all at once gives.
            progress: told how many completions are finished.

        Raises:
            EngineError: a prompt is empty, holds an unknown token id or is longer than the model's context.
            ConfigError: a prompt and `max_tokens` together are longer than the model's context.
        """
        ...


class EngineConfig(StrictConfig):
    """Which engine writes text, and how it samples unless it is told otherwise."""

    kind: str
    sampling: Sampling = Sampling()
    """How tokens are drawn; a response policy or an evaluation may have its own."""

    @abstractmethod
    def build(self, model: Any, facts: TokenizerFacts) -> Engine:
        """The engine over a model. It reads the model's weights as they are at each call."""

    def for_student(self) -> EngineConfig:
        """What writes with a model whose weights change in this process; itself unless it cannot."""
        return self


REGISTRY: Registry[EngineConfig] = Registry("engine", EngineConfig)  # type: ignore[type-abstract]
