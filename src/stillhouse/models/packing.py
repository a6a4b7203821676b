"""Sequences one after the other in one row, without padding, each of which attends to itself alone.

There are two ways. Variable length: attention knows where sequences begin, in a kernel made for it (that of
flash-attention, or torch's own behind "sdpa") or, where none runs, in one call for each sequence.
Block-diagonal: a mask over all pairs of tokens, for any attention, whose cost grows with the square of all
tokens. Positions begin anew in each sequence in both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stillhouse.core.batch import PackedTokens, TokenBatch
from stillhouse.errors import ModelError

Way = Literal["variable-length", "block-diagonal"]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Packing:
    """How a model reads packed sequences.

    Example: `Packing("variable-length", torch.bfloat16, only_by_kernel=True)`
    """

    way: Way
    dtype: torch.dtype
    """Of its matrix products; its calls enter their autocast themselves, if there is one."""
    only_by_kernel: bool
    """Pack only where a variable-length kernel runs, which takes float16 and bfloat16 on a GPU."""


_PACKINGS: WeakKeyDictionary[nn.Module, Packing] = WeakKeyDictionary()


def set_packing(inner: nn.Module, packing: Packing | None) -> None:
    """Say how a transformers model reads batches with padding from now on; None: as they are."""
    if packing is None:
        _PACKINGS.pop(inner, None)
        return
    if packing.way == "variable-length" and attention_of(inner) == "sdpa":
        _register()
    _PACKINGS[inner] = packing


def attention_of(inner: Any) -> str:
    """The name of a model's attention implementation."""
    return str(getattr(inner.config, "_attn_implementation", None) or "eager")


def packs(inner: nn.Module) -> bool:
    """Whether the model packs here and now, on its device and in training or not."""
    packing = _PACKINGS.get(inner)
    return packing is not None and (not packing.only_by_kernel or _has_kernel(inner, packing.dtype))


def arguments(inner: nn.Module, packed: PackedTokens) -> dict[str, Any]:
    """What a model that packs is called with besides the token ids."""
    found: dict[str, Any] = {"position_ids": packed.position_ids}
    if _PACKINGS[inner].way == "block-diagonal":
        return found
    longest = max(packed.lengths)
    found |= {"cu_seq_lens_q": packed.boundaries, "cu_seq_lens_k": packed.boundaries}
    found |= {"max_length_q": longest, "max_length_k": longest}
    if attention_of(inner) == "sdpa":
        # transformers passes a mask through that is 4D already; otherwise it may make one of S x S.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.input_ids.device)
        found |= {"sequence_lengths": SequenceLengths(packed.lengths), "attention_mask": mask}
    return found


def packed_for(inner: nn.Module, batch: TokenBatch) -> PackedTokens | None:
    """The batch as a model that packs reads it; None where it reads the padded one, as with images."""
    return batch.packed() if batch.padded and not batch.images and packs(inner) else None


def sequence_ids(inner: nn.Module, packed: PackedTokens | None) -> Tensor | None:
    """[1, S] what transformers is to make a mask from; None where it makes none."""
    if packed is None or _PACKINGS[inner].way == "variable-length":
        return None
    return packed.sequence_ids


def _has_kernel(inner: nn.Module, dtype: torch.dtype) -> bool:
    if next(inner.parameters()).device.type != "cuda" or dtype not in HALF:
        return False
    if attention_of(inner) != "sdpa":
        return True
    return KERNEL is not None and not (inner.training and _attention_dropout(inner))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products with it: that of autocast, if there is one."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _attention_dropout(inner: Any) -> float:
    names = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
    return max(float(getattr(inner.config, name, None) or 0.0) for name in names)


class SequenceLengths:
    """Tokens of each packed sequence, as layers pass them on to attention.

    An object without fields of its own for `torch.compile`, which would compile anew for each number of
    sequences in a tuple.
    """

    def __init__(self, values: tuple[int, ...]) -> None:
        self.values = values


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


@cache
def _register() -> None:
    """Let "sdpa" know what to do with packed sequences; without `sequence_lengths` it is as it was."""
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", packed_sdpa)


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
