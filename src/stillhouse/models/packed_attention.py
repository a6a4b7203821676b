"""Attention of packed sequences, each to itself alone, behind the name "sdpa".

Imported when the first model is packed so: parts belong to torch's compiler, which takes a second to load.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.models.packing import HALF, SequenceLengths

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None, int | None], Tensor]
"""Of queries, keys and values [S, H, D], boundaries, greatest length, scale and window: [S, H, D]."""


def _torch_kernel() -> Kernel | None:
    """torch's variable-length attention, where this version has one that knows windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= known.keys():
        return None
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: Tensor,
        longest: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        if not grouped and (times := query.shape[1] // key.shape[1]) > 1:
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        left = -1 if window is None else window - 1
        options = {"scale": scale, "window_size": (left, 0), **grouped}
        found: Any = varlen_attn(query, key, value, ends, ends, longest, longest, **options)
        assert isinstance(found, Tensor)  # a pair only where it was asked for
        return found

    return attend


KERNEL = _torch_kernel()


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: SequenceLengths | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each of several sequences to itself; of transformers without `sequence_lengths`.

    Args:
        module: the attention layer.
        query: [1, H, S, D], the sequences one after the other.
        key: [1, H_kv, S, D]
        value: [1, H_kv, S, D']
        attention_mask: that of `arguments`, or None: what is later or in another sequence is not seen anyway.
        sequence_lengths: tokens of each sequence, S in all.
        **options: of transformers' attention: `cu_seq_lens_q`, `dropout`, `scaling`, `sliding_window`, ...

    Returns:
        [1, S, H, D'], and no weights.

    Raises:
        ModelError: the layer does more than causal attention, such as with a mask of its own.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sequence_lengths is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return found
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    own_mask = attention_mask is not None and attention_mask.numel() > 1  # not the one of `arguments`
    biases = any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    # A window that is known to the mask alone would be lost: the mask is not used.
    lost = (
        getattr(getattr(module, "config", None), "sliding_window", None) and "sliding_window" not in options
    )
    if not causal or own_mask or biases or lost:
        raise ModelError(f"{type(module).__name__} does more than causal attention, which is not packed.")
    window, dropout = options.get("sliding_window"), options.get("dropout") or 0.0
    scale, kernel, dtype = options.get("scaling"), KERNEL, _compute_dtype(query)
    if kernel is not None and not dropout and query.is_cuda and dtype in HALF and _fits(query, value):
        q, k, v = (one[0].transpose(0, 1).to(dtype) for one in (query, key, value))
        return kernel(q, k, v, options["cu_seq_lens_q"], options["max_length_q"], scale, window)[None], None
    return _one_by_one(module, (query, key, value), sequence_lengths, dropout, scale, window), None


@torch.compiler.disable
def _one_by_one(
    module: nn.Module,
    packed: tuple[Tensor, Tensor, Tensor],
    lengths: SequenceLengths,
    dropout: float,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """[1, S, H, D']: causal attention in a call for each sequence."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    parts = zip(*(whole.split(lengths.values, dim=2) for whole in packed), strict=True)
    found = [
        sdpa_attention_forward(module, *one, _window_mask(one[0], window), dropout=dropout, scaling=scale)[0]
        for one in parts
    ]
    return torch.cat(found, dim=1)


def _fits(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention has a kernel for this width of the heads."""
    width = query.shape[-1]
    return width == value.shape[-1] and width <= 256 and width % 8 == 0


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """[1, 1, L, L] for a sequence that is longer than the window; causal attention alone needs none."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=query.device)
    back = places[:, None] - places
    return ((back >= 0) & (back < window))[None, None]


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products with it: that of autocast, if there is one."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
