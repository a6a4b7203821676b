"""Generation with a transformers model in this process, also one that is being trained."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stillhouse.core.types import Completion
from stillhouse.engines.base import (
    REGISTRY,
    Engine,
    EngineConfig,
    Finished,
    ProgressCall,
    Sampling,
    TokenizerFacts,
)
from stillhouse.errors import ConfigError, EngineError, Fault

if TYPE_CHECKING:
    from torch import nn


@REGISTRY.register
class TransformersConfig(EngineConfig):
    """A lean decode loop over the model itself: no copy of the weights, nothing to synchronise.

    Example: `engine: {kind: transformers, batch_size: 64, sampling: {temperature: 0.8}}`
    """

    kind: Literal["transformers"] = "transformers"
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Most completions that are written side by side. It changes speed and memory, not the text."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens in the key-value cache: rows times (longest prompt + `max_tokens`); none: no limit."""

    weights: Literal["model", "bfloat16"] = "model"
    """`bfloat16` writes with a rounded copy, made anew at each call: about twice as fast for fp32 models of
    30M parameters and more, for half their memory on top. The text then follows the rounded model's
    distribution, not quite the model's own, and `logprobs` are the rounded one's."""

    def build(self, model: Any, facts: TokenizerFacts) -> Engine:
        """The engine over a causal language model, possibly wrapped by DDP, torch.compile or peft."""
        return TransformersEngine(
            model, facts, self.batch_size, self.batch_tokens, self.weights == "bfloat16"
        )


class TransformersEngine:
    """Samples from a transformers model exactly as its `generate` does, faster.

    Architectures whose layers are all attention run in the decode loop of `decode.py`; any other one
    (recurrent, hybrid) runs through `generate` with this engine's draw.

    Example:
        >>> engine = TransformersConfig().build(model, TokenizerFacts.of(tokenizer))
        >>> engine.generate([[5, 9, 12]], Sampling(max_tokens=20), seed=0)
    """

    def __init__(
        self,
        model: nn.Module,
        facts: TokenizerFacts,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        rounded: bool = False,
    ) -> None:
        self.model = model
        self.facts = facts
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.rounded = rounded

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
        *,
        numbers: Sequence[int] | None = None,
        progress: ProgressCall | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in the order of the prompts; see `Engine.generate`.

        The model may be in training: its mode is restored, and its parameters can be trained afterwards.
        """
        from stillhouse.engines.decode import Decoder
        from stillhouse.engines.fallback import run_generate
        from stillhouse.engines.kv import num_attention_layers
        from stillhouse.models.hidden import unwrap

        model = unwrap(self.model)
        check_prompts(prompts, sampling, model.config)
        if not prompts:
            return []
        finish = Finished(len(prompts), progress)
        rows = self._rows(max(map(len, prompts)) + sampling.max_tokens)
        num_layers = num_attention_layers(model.config)
        model = rounded_copy(model) if self.rounded else model
        with evaluating(model):
            if num_layers is None:
                run_generate(model, self.facts, sampling, seed, prompts, rows, finish, numbers)
            else:
                Decoder(model, self.facts, sampling, seed, num_layers).run(prompts, rows, finish, numbers)
        return finish.in_order()

    def _rows(self, length: int) -> int:
        if self.batch_tokens is None:
            return self.batch_size
        return max(1, min(self.batch_size, self.batch_tokens // length))


def rounded_copy(model: nn.Module) -> nn.Module:
    """The model with parameters in bfloat16; buffers, such as rotary frequencies, keep their precision."""
    import torch

    # Every parameter is named in the memo beforehand, so that deepcopy makes no second fp32 one; shared
    # parameters (tied embeddings) stay shared.
    memo: dict[int, Any] = {
        id(parameter): torch.nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; every module's own mode comes back after it.

    Autocast that accelerate enters at each call of a model is held open meanwhile: weights are cast once, not
    again for each token. Not `torch.inference_mode`: buffers made inside it could not be used in training.
    """
    import torch

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), _own_autocast(model):
            yield
    finally:
        # Weights that were cast without gradients must not serve a training step within the same autocast.
        torch.clear_autocast_cache()
        for module in training:
            module.training = True


def _own_autocast(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The autocast that a model, prepared by accelerate for mixed precision, enters at each call."""
    if not any(hasattr(module, "_original_forward") for module in model.modules()):
        return contextlib.nullcontext()
    from accelerate.utils.modeling import get_mixed_precision_context_manager

    context: contextlib.AbstractContextManager[None] = get_mixed_precision_context_manager(native_amp=True)
    return context


def check_prompts(prompts: Sequence[Sequence[int]], sampling: Sampling, config: Any) -> None:
    """Refuse prompts that the model cannot take.

    Raises:
        EngineError: an empty prompt, an unknown token id, or a prompt that fills the model's context.
        ConfigError: no room for `max_tokens` after the longest prompt.
    """
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    vocab = text.vocab_size
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise EngineError(f"prompt {index}: is empty. Generation needs at least one token, such as BOS.")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise EngineError(
                f"prompt {index}: holds token ids {min(prompt)} to {max(prompt)}; the model knows "
                f"0 to {vocab - 1}. Tokenize with the model's own tokenizer."
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
