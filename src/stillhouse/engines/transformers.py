"""Generation with a transformers model in this process, which may be in training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stillhouse.core.images import ImageRef
from stillhouse.core.types import Completion
from stillhouse.engines.base import (
    REGISTRY,
    CompletionCollector,
    Engine,
    EngineConfig,
    ProgressCallback,
    Sampling,
    TokenizerInfo,
)
from stillhouse.errors import ConfigError, EngineError, Fault

if TYPE_CHECKING:
    from torch import nn


KvCache = Literal["auto", "growing", "static"]
"""How keys and values are kept while a text is written; see `TransformersConfig.kv_cache`."""


@REGISTRY.register
class TransformersConfig(EngineConfig):
    """Our own decode loop over the model in memory: no second copy of the weights, nothing to synchronise.

    Example: `engine: {kind: transformers, batch_size: 64, sampling: {temperature: 0.8}}`
    """

    kind: Literal["transformers"] = "transformers"
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Maximum number of completions that are decoded together. It changes speed and memory, not the text."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of tokens in the KV cache: rows times (longest prompt + `max_tokens`); default: no
    limit."""
    dtype: Literal["model", "bfloat16"] = "model"
    """`model` generates with the weights as they are; `bfloat16` with a rounded copy made at each call: about
    twice as fast for fp32 models of 30M parameters and more, for half their memory on top. The text and
    `logprobs` are then those of the rounded model."""

    kv_cache: KvCache = "auto"
    """`growing`: keys and values of as many columns as there are tokens. `static`: buffers of a fixed shape,
    so that a decoding step can be replayed as a CUDA graph instead of being launched kernel by kernel; on a
    CPU it is only slower. `auto`: static on CUDA where the architecture allows it, else growing. The text is
    the same up to rounding."""

    def kept_tokens(self, rows: int, length: int, on_gpu: bool) -> int:
        """Those of the static buffers."""
        if not rows or self.kv_cache == "growing" or (self.kv_cache == "auto" and not on_gpu):
            return 0
        if self.batch_tokens is not None:
            rows = max(1, min(rows, self.batch_tokens // length))
        return buffer_rows(rows, self.batch_size) * buffer_slots(length)

    @property
    def casts_weights(self) -> bool:
        """With `dtype: bfloat16`."""
        return self.dtype == "bfloat16"

    def build(self, model: Any, tokenizer_info: TokenizerInfo) -> Engine:
        """The engine over a causal language model, possibly wrapped by DDP, torch.compile or peft."""
        return TransformersEngine(
            model, tokenizer_info, self.batch_size, self.batch_tokens, self.dtype == "bfloat16", self.kv_cache
        )


class TransformersEngine:
    """Samples the same distribution as the model's own `generate`, faster.

    Architectures whose layers are all attention run in the decode loop of `decode.py`; the others
    (recurrent, hybrid) through `generate` with this engine's sampler. Either way prompts with images and
    without are mixed, and the images of a prompt are read once, in the first pass over it.

    Example:
        >>> engine = TransformersConfig().build(model, TokenizerInfo.from_tokenizer(tokenizer))
        >>> engine.generate([[5, 9, 12]], Sampling(max_tokens=20), seed=0)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer_info: TokenizerInfo,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        bfloat16: bool = False,
        kv_cache: KvCache = "auto",
    ) -> None:
        from stillhouse.engines.static_decode import StaticDecoding

        self.model = model
        self.tokenizer_info = tokenizer_info
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.bfloat16 = bfloat16
        self.kv_cache = kv_cache
        self._static = StaticDecoding(tokenizer_info, kv_cache)
        self._copy: nn.Module | None = None

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
        """One completion for each prompt, in the order of the prompts; see `Engine.generate`.

        The model may be in training: its mode is restored, and its parameters remain trainable.
        """
        from stillhouse.engines.decode import Decoder
        from stillhouse.engines.fallback import GenerateDecoder
        from stillhouse.engines.kv_cache import num_attention_layers
        from stillhouse.models.hidden import unwrap

        model = unwrap(self.model)
        check_prompts(prompts, sampling, model.config)
        if not prompts:
            return []
        completions = CompletionCollector(len(prompts), progress)
        rows = self._batch_size(max(map(len, prompts)) + sampling.max_tokens)
        num_layers = num_attention_layers(model.config)
        trained = is_trained(model)
        model = self._rounded(model, trained) if self.bfloat16 else model
        info = self.tokenizer_info
        with evaluating(model):
            if (static := self._static.decoder(model, num_layers, prompts, trained)) is not None:
                static.run(prompts, sampling, seed, rows, completions, sample_ids, images)
            elif num_layers is None:
                by_itself = GenerateDecoder(model, info, sampling, seed)
                by_itself.run(prompts, rows, completions, sample_ids, images)
            else:
                decoder = Decoder(model, info, sampling, seed, num_layers)
                decoder.run(prompts, rows, completions, sample_ids, images)
        return completions.in_order()

    def _rounded(self, model: nn.Module, trained: bool) -> nn.Module:
        """A copy in bfloat16 with the weights of now; in the same storage as before where graphs read it."""
        if not trained or not self._static.wanted(model):
            return bfloat16_copy(model)
        if self._copy is None:
            self._copy = bfloat16_copy(model)
        else:
            refresh_copy(self._copy, model)
        return self._copy

    def _batch_size(self, length: int) -> int:
        if self.batch_tokens is None:
            return self.batch_size
        return max(1, min(self.batch_size, self.batch_tokens // length))


SLOTS = 128
"""Static buffers hold a multiple of this many tokens for each row."""


def buffer_rows(wanted: int, most: int) -> int:
    """The rows of static buffers for so many completions at once, of at most `most`."""
    return min(most, power_of_two(wanted))


def buffer_slots(length: int) -> int:
    """The slots of a row of static buffers for at least `length` tokens."""
    return -(-length // SLOTS) * SLOTS


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def bfloat16_copy(model: nn.Module) -> nn.Module:
    """A copy with the parameters in bfloat16; buffers, such as rotary frequencies, keep their dtype."""
    import torch

    # With every parameter in the memo deepcopy makes no fp32 copies, and tied embeddings stay tied.
    memo: dict[int, Any] = {
        id(parameter): torch.nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


def is_trained(model: nn.Module) -> bool:
    """Whether any of its weights is."""
    return any(parameter.requires_grad for parameter in model.parameters())


def refresh_copy(copied: nn.Module, model: nn.Module) -> None:
    """Bring a `bfloat16_copy` up to date, in place."""
    import torch

    with torch.no_grad():
        torch._foreach_copy_(list(copied.parameters()), list(model.parameters()))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode of every module on exit.

    Holds open the autocast that accelerate enters at each call of the model, so that weights are cast once
    instead of once per token. Not `torch.inference_mode`: buffers made in it could not be used in training.
    """
    import torch

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), _autocast_of(model):
            yield
    finally:
        # Weights cast without gradients must not be reused by a training step in the same autocast.
        torch.clear_autocast_cache()
        for module in training:
            module.training = True


def _autocast_of(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The autocast that a model prepared by accelerate for mixed precision enters at each call."""
    if not any(hasattr(module, "_original_forward") for module in model.modules()):
        return contextlib.nullcontext()
    from accelerate.utils.modeling import get_mixed_precision_context_manager

    context: contextlib.AbstractContextManager[None] = get_mixed_precision_context_manager(native_amp=True)
    return context


def check_prompts(prompts: Sequence[Sequence[int]], sampling: Sampling, config: Any) -> None:
    """Check that the prompts fit the model.

    Raises:
        EngineError: a prompt is empty, has an unknown token id or fills the model's context.
        ConfigError: `max_tokens` does not fit after the longest prompt.
    """
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    vocab = text.vocab_size
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise EngineError(f"prompt {index}: is empty. Generation needs at least one token, such as BOS.")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise EngineError(
                f"prompt {index}: holds token ids {min(prompt)} to {max(prompt)}; the model's are "
                f"0 to {vocab - 1}. Tokenise with the model's own tokenizer."
            )
        if context and len(prompt) >= context:
            raise EngineError(
                f"prompt {index}: has {len(prompt)} tokens; the model's context is {context}. "
                "Shorten the prompt."
            )
    longest = max(map(len, prompts), default=0)
    if context and longest + sampling.max_tokens > context:
        raise ConfigError(
            Fault(
                "engine.sampling.max_tokens",
                f"the longest prompt has {longest} tokens and the model's context is {context}",
                got=str(sampling.max_tokens),
                allowed=f"at most {context - longest}",
            )
        )
