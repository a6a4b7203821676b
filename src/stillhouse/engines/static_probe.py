"""Whether a model can decode with buffers of fixed shape: are its logits those of whole texts?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.engines.base import Sampling, TokenizerInfo
from stillhouse.engines.kv_cache import PreallocatedCache
from stillhouse.engines.prefill import NextTokenLogits, prefill
from stillhouse.engines.sampling import PAD, Sampler, uniforms
from stillhouse.engines.slot_cache import SlotCache
from stillhouse.engines.static_step import DecodeBuffers, DecodeStep

STEPS, LENGTH, CAPACITY = 3, 8, 16
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Greatest distance of logits, as a fraction of their spread, by the dtype of the weights."""
HALF_TOLERANCE = 0.05


@torch.no_grad()
def why_not_static(
    next_logits: NextTokenLogits,
    masks: Callable[[SlotCache], Any],
    num_layers: int,
    tokenizer_info: TokenizerInfo,
    prompt: Sequence[int],
) -> str | None:
    """Why a model's decoding step cannot be of fixed shape, in words; None if it can.

    Some tokens are decoded after the beginning of a prompt, in a batch with a shorter beginning.
    """
    for part in next_logits.model.modules():
        kind = getattr(getattr(part, "config", None), "_attn_implementation", "sdpa")
        if kind not in ("sdpa", "eager"):
            return f"its attention implementation is {kind}"
    prompts = [list(prompt[:LENGTH]), list(prompt[: len(prompt[:LENGTH]) // 2 + 1])]
    sampling = Sampling(temperature=0.0, max_tokens=STEPS + 2)
    eos = torch.empty(0, dtype=torch.long, device=next_logits.device)
    uniform = uniforms(0, [0, 1], sampling.max_tokens + 1).to(next_logits.device)
    done = prefill(next_logits, Sampler(sampling, eos), prompts, uniform[:, 0], num_layers, tokenizer_info)
    buffers = DecodeBuffers.allocate(done, rows=3, capacity=CAPACITY)
    buffers.fill([0, 2], done, uniform, sampling, eos)
    step = DecodeStep(next_logits, masks, Sampler(sampling, eos, static=True), eos, sampling.max_tokens)
    limit = TOLERANCE.get(next(next_logits.model.parameters()).dtype, HALF_TOLERANCE)
    if torch.is_autocast_enabled(next_logits.device.type):
        limit = HALF_TOLERANCE
    for _ in range(STEPS):
        try:
            logits = step.logits(buffers)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
            return f"its forward pass does not take such a batch ({type(error).__name__})"
        for row in (0, 2):
            whole = _after(next_logits, buffers.history[row, : int(buffers.last[row]) + 1], num_layers)
            written = whole != -torch.inf  # the others are never sampled
            own, whole = logits[row][written], whole[written]
            distance = float((own - whole).norm() / (whole - whole.mean()).norm())
            if not distance <= limit:  # nor is it if it is not a number
                return f"its logits then differ by {distance:.2g} of their spread"
        step(buffers)
    return None


def _after(next_logits: NextTokenLogits, text: Tensor, num_layers: int) -> Tensor:
    """The logits [V] after a text [t], computed in one pass."""
    assert bool((text != PAD).all())
    ids, positions = text[None], torch.arange(len(text), device=text.device)[None]
    cache = PreallocatedCache(num_layers, len(text))
    return next_logits(ids, torch.ones_like(ids, dtype=torch.bool), positions, cache)[0]
