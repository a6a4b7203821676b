"""The interface of a generation engine and its sampling settings; imports no model library."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol

from pydantic import Field

from stillhouse.config import Registry, StrictConfig, because
from stillhouse.core.images import ImageRef
from stillhouse.core.types import Completion

ProgressCallback = Callable[[int, int], None]
"""Called with (completions finished, completions in total)."""


class Sampling(StrictConfig):
    """How the next token is sampled from the model's logits.

    The settings apply in this order, each as the logits processor of that name in transformers:
    repetition_penalty, no_repeat_ngram_size, min_tokens, temperature, top_k, top_p, min_p.
    A response ends with an end-of-sequence token or at `max_tokens`.

    Example: `Sampling(temperature=0.8, top_p=0.95, max_tokens=256)`
    """

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Divides the logits. 0 is greedy decoding, for which top_k, top_p and min_p have no effect."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k most likely tokens and ties with the last of them; 0: all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the smallest set of most likely tokens whose total probability is at least this; 1: all."""
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Sample from tokens with at least this fraction of the most likely token's probability; 0: all."""
    max_tokens: Annotated[int, Field(ge=1)] = 256
    """Maximum length of a response, its end-of-sequence token included."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """No end-of-sequence token is sampled before a response has this many tokens."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """No n-gram of this size occurs twice in prompt and response together; 0: no limit."""
    repetition_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    """Logits of tokens in prompt or response are divided by it if positive, multiplied if negative."""
    logprobs: bool = False
    """Also return the log-probability (nats) of each token under the distribution it was sampled from.

    With temperature 0 that is the model's own distribution after repetition_penalty and bans.
    """

    @property
    def altered(self) -> str:
        """The settings with which tokens are not drawn from the model's own distribution, in words."""
        plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        plain |= {"min_tokens": 0, "no_repeat_ngram_size": 0}
        changed = {name: getattr(self, name) for name in plain if getattr(self, name) != plain[name]}
        return ", ".join(f"{name} {value:g}" for name, value in changed.items())

    def options_without_effect(self) -> dict[str, str]:
        if self.temperature == 0:
            return because("temperature 0 takes the most likely token", "top_k", "top_p", "min_p")
        one = self.top_k == 1
        return because("top_k 1 leaves one token", "temperature", "top_p", "min_p") if one else {}


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """What an engine needs to know about the tokenizer.

    Example: `TokenizerInfo(eos_ids=(2,), pad_id=2)`
    """

    eos_ids: tuple[int, ...]
    """Tokens that end a response; the first is the one that is trained and that stands for the others."""
    pad_id: int
    """Left padding of shorter prompts; it is masked, so any valid id does."""
    tokenizer: Any = field(default=None, repr=False, compare=False)
    """The tokenizer itself, for engines that exchange text with a server and for `vocab_size`."""

    shared: int | None = None
    """How many ids, from the first, may be sampled, where these are not all of the tokenizer's."""

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids. Rows of the head beyond it are padding and never sampled; None: no padding."""
        return self.shared if self.shared is not None or self.tokenizer is None else len(self.tokenizer)

    def ended_by(self, ends: Iterable[int]) -> TokenizerInfo:
        """The same with these end tokens before those that there are."""
        return replace(self, eos_ids=tuple(dict.fromkeys((*ends, *self.eos_ids))))

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenizerInfo:
        """From a transformers tokenizer; without a pad token, its first end-of-sequence token pads."""
        eos = tokenizer.eos_token_id
        eos_ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
        pad = tokenizer.pad_token_id
        return cls(eos_ids, pad if pad is not None else (eos_ids[0] if eos_ids else 0), tokenizer)


class CompletionCollector:
    """Collects completions in the order in which they finish, reports progress, and returns them in order."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self._total = total
        self._progress = progress
        self._done: dict[int, Completion] = {}

    def __call__(self, index: int, completion: Completion) -> None:
        """Add the completion of prompt `index`."""
        self._done[index] = completion
        if self._progress is not None:
            self._progress(len(self._done), self._total)

    def in_order(self) -> list[Completion]:
        """All completions, in the order of the prompts."""
        return [self._done[index] for index in range(self._total)]


class Engine(Protocol):
    """Generates completions for prompts."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        sample_ids: Sequence[int] | None = None,
        progress: ProgressCallback | None = None,
        images: Sequence[tuple[ImageRef, ...]] = (),
    ) -> list[Completion]:
        """One completion for each prompt, in the order of the prompts.

        Args:
            prompts: token ids, at least one each, without padding. Equal prompts get independent samples.
            sampling: how tokens are sampled.
            seed: the same prompts, weights and seed give the same completions.
            sample_ids: the random stream of a prompt depends on `seed` and its sample id only. By default
                its index in `prompts`; for a subset of a larger set pass the indices in that set, which
                gives the completions that generating the whole set would give.
            progress: called with the number of finished completions.
            images: those of each prompt, whose tokens the prompts have; empty: none has any.

        Raises:
            EngineError: a prompt is empty, holds an unknown token id or exceeds the model's context, or the
                engine reads no images.
            ConfigError: the longest prompt and `max_tokens` together exceed the model's context.
        """
        ...


class EngineConfig(StrictConfig):
    """Which engine generates, and its default sampling."""

    kind: str
    sampling: Sampling = Sampling()
    """How tokens are sampled; a response policy or an evaluation may override it."""

    @abstractmethod
    def build(self, model: Any, tokenizer_info: TokenizerInfo) -> Engine:
        """The engine over a model. Each call of `generate` uses the model's current weights."""

    def check_installed(self) -> None:
        """Make sure that what it is made of is there, before anything loads.

        Raises:
            EnvironmentFault: a package or a device is missing.
        """

    def kept_tokens(self, rows: int, length: int, on_gpu: bool) -> int:
        """How many tokens' keys and values stay allocated between calls, for an estimate of memory.

        Args:
            rows: completions at the same time, at most.
            length: tokens of the longest prompt and its completion.
            on_gpu: whether the model is on a GPU.
        """
        return 0

    @property
    def gpus(self) -> int:
        """How many GPUs one engine takes, where there are any."""
        return 1

    @property
    def casts_weights(self) -> bool:
        """Whether it generates with a copy of the model in another dtype."""
        return False

    def for_student(self) -> EngineConfig:
        """The engine for a model that is trained here; `self` unless it cannot follow its weights."""
        return self


REGISTRY: Registry[EngineConfig] = Registry("engine", EngineConfig)  # type: ignore[type-abstract]
