"""What every way of decoding starts with: prompts run at once, and the first token of each."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from stillhouse.core.images import ImageRef
from stillhouse.engines.base import TokenizerInfo
from stillhouse.engines.images import image_inputs, image_token
from stillhouse.engines.kv_cache import PreallocatedCache
from stillhouse.engines.sampling import PAD, Sampler

MIN_PREFILL_TOKENS = 256
"""Minimum tokens, padding included, of a prefill batch before shorter prompts start a batch of their own."""


class NextTokenLogits:
    """Calls a causal language model for the logits [B, V] of the next token.

    Example:
        >>> next_logits = NextTokenLogits(model, vocab_size=49152)
        >>> next_logits(ids, mask, positions, cache)
    """

    def __init__(self, model: nn.Module, vocab_size: int | None) -> None:
        """`vocab_size`: rows of the head beyond it are padding; None: there are none."""
        self.model = model
        self.vocab_size = vocab_size
        self.device = next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.never = image_token(model)
        self.extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def __call__(self, ids: Tensor, mask: Any, positions: Tensor, cache: Cache, **images: Any) -> Tensor:
        """The logits after the last of the token ids [B, t], which are appended to the cache.

        Args:
            ids: [B, t].
            mask: what the model takes: which columns of the cache hold tokens, or which each id attends to.
            positions: [B, t].
            cache: the keys and values of the tokens before.
            **images: `ImageInputs.arguments`, where the ids have image tokens.
        """
        inputs: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        inputs |= images
        output = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **inputs, **self.extra
        )
        logits: Tensor = output.logits[:, -1, : self.vocab_size].float()
        if self.never is not None:
            logits[:, self.never] = -torch.inf
        return logits


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts, padded on the left, after their first token was sampled."""

    cache: PreallocatedCache
    history: Tensor
    """[B, L] token ids of the prompts, `PAD` to their left."""
    tokens: Tensor
    """[B] the first tokens."""
    logprobs: Tensor | None
    """[B] their log-probabilities, where asked for."""
    next_positions: list[int]
    """[B] the positions of the first tokens; see `ImageInputs.next_positions`."""


def prefill(
    next_logits: NextTokenLogits,
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    uniform: Tensor,
    num_layers: int,
    tokenizer_info: TokenizerInfo,
    images: Sequence[tuple[ImageRef, ...]] = (),
) -> Prefilled:
    """Run prompts and sample the first token of each with the numbers `uniform` [B].

    `images` are those of each prompt; empty: none has any.
    """
    width = max(map(len, prompts))
    device = next_logits.device
    history = torch.tensor(
        [[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    mask = history != PAD
    cache = PreallocatedCache(num_layers, width)
    ids = history.masked_fill(~mask, tokenizer_info.pad_id)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    next_positions = list(map(len, prompts))
    if any(images):
        shown = image_inputs(next_logits.model, prompts, images, width)
        logits = next_logits(ids, mask, positions, cache, **shown.arguments)
        next_positions = shown.next_positions
    else:
        logits = next_logits(ids, mask, positions, cache)
    generated = torch.zeros(len(prompts), dtype=torch.long, device=device)
    tokens, logprobs = sampler.sample(logits, history, generated, uniform)
    return Prefilled(cache, history, tokens, logprobs, next_positions)


def group_by_length(
    indices: list[int], prompts: Sequence[Sequence[int]], least: int = MIN_PREFILL_TOKENS
) -> list[list[int]]:
    """Split prompts of decreasing length into prefill batches with little padding.

    A batch ends before a prompt shorter than 3/4 of its longest, once it holds `least` tokens.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in indices:
        length = len(prompts[index])
        if not groups or (length < longest * 3 / 4 and len(groups[-1]) * longest >= least):
            groups.append([])
            longest = length
        groups[-1].append(index)
    return groups
