"""Sequences one after the other in one row, without padding, each of which attends to itself alone.

There are two ways. Variable length: attention knows where sequences begin, in a kernel made for it (that of
flash-attention, or torch's own behind "sdpa") or, where none runs, in one call for each sequence.
Block-diagonal: a mask over all pairs of tokens, for any attention, whose cost grows with the square of all
tokens. Positions begin anew in each sequence in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stillhouse.core.batch import PackedTokens, TokenBatch

Way = Literal["variable-length", "block-diagonal"]
HALF = (torch.float16, torch.bfloat16)
"""What variable-length kernels take."""


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
    return has_torch_kernel() and not (inner.training and _attention_dropout(inner))


def has_torch_kernel() -> bool:
    """Whether torch has a variable-length attention of its own."""
    from stillhouse.models.packed_attention import KERNEL

    return KERNEL is not None


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


@cache
def _register() -> None:
    """Let "sdpa" know what to do with packed sequences; without `sequence_lengths` it is as it was."""
    from transformers import AttentionInterface

    from stillhouse.models.packed_attention import packed_sdpa

    AttentionInterface.register("sdpa", packed_sdpa)
