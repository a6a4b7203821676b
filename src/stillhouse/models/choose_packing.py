"""Whether a model may read packed sequences: tried on two short ones, not read off its name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import ModelError
from stillhouse.models.hidden import hidden_rows, unwrap
from stillhouse.models.packing import HALF, Packing, Way, attention_of, has_torch_kernel, set_packing
from stillhouse.models.vision import reads_images

PackingMode = Literal["auto", "on", "off"]
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers that are attention."""
FAILURES = (
    ModelError,
    AssertionError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
)
"""What an architecture may raise that cannot be called with packed sequences."""


@torch.no_grad()
def choose_packing(model: nn.Module, mode: PackingMode, dtype: torch.dtype | None = None) -> str | None:
    """Let a model read batches with padding packed, if it gives the same hidden states then.

    Args:
        model: a causal language model on its device, possibly wrapped.
        mode: "auto": where a variable-length kernel runs, on a GPU; "on": everywhere; "off": nowhere.
        dtype: of the autocast that its calls enter, if they enter one.

    Returns:
        Why batches are padded though packing was asked for or would be faster; None if there is nothing to
        tell.
    """
    inner = unwrap(model)
    set_packing(inner, None)
    weight = next(inner.parameters())
    device, products = weight.device, dtype or weight.dtype
    ways = _ways(attention_of(inner), mode, device)
    reasons = []
    for way in ways:
        set_packing(inner, Packing(way, products, only_by_kernel=False))
        training = inner.training
        inner.eval()
        try:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                reason = _refused_by_facts(inner, products) or _difference(inner, device)
        except FAILURES as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            inner.train(training)
        set_packing(inner, None if reason else Packing(way, products, only_by_kernel=mode == "auto"))
        if reason is None:
            return None
        reasons.append(f"{way}: {reason}")
    if not ways:
        return None
    return (
        f"{type(inner).__name__} with {attention_of(inner)} attention reads padded batches, it cannot pack "
        f"({'; '.join(reasons)})"
    )


def _ways(attention: str, mode: PackingMode, device: torch.device) -> Sequence[Way]:
    """What is tried, the best first."""
    flash = attention.startswith("flash")
    if mode == "off":
        return ()
    if mode == "auto":
        kernel = flash or (attention == "sdpa" and has_torch_kernel())
        return ("variable-length",) if device.type == "cuda" and kernel else ()
    if flash:
        return ("variable-length",)
    return ("variable-length", "block-diagonal") if attention == "sdpa" else ("block-diagonal",)


def _refused_by_facts(inner: Any, products: torch.dtype) -> str | None:
    """What two short sequences would not show, or not in half precision."""
    if reads_images(inner.config):
        return "it reads images"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return "it takes no positions"
    if getattr(inner.config, "alibi", False):
        return "ALiBi counts positions through the whole row"
    if products in HALF:
        kinds = {str(kind) for kind in getattr(inner.config, "layer_types", None) or ()}
        if any(isinstance(module, nn.Conv1d) for module in inner.modules()) or kinds - ATTENDING:
            return "it has layers that are not attention, whose state rounding would hide"
    return None


def _difference(inner: nn.Module, device: torch.device) -> str | None:
    """Whether a packed pair has the hidden states of its sequences one by one.

    In float32 the two are compared. In half precision rounding would hide a small leak; there packed pairs of
    the same shape are compared, whose states are the same to the bit where nothing leaks: in the other order,
    after another sequence, and with other last tokens, on which no state depends.
    """
    first, second = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), (7, 3, 9, 4, 8)
    alone = torch.cat([_hidden(inner, [ids], device) for ids in (first, second)])
    packed = _hidden(inner, [first, second], device)
    size, rows = alone.norm(), len(first) - 1
    error = (packed - alone).norm() / size
    if alone.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(device.type):
        limit = 1e-4
    else:
        limit = 0.1  # rounding adds up over many layers, and what it could hide is looked for below
        swapped = _hidden(inner, [second, first], device)
        after_another = _hidden(inner, [first[::-1], second], device)
        other_ends = _hidden(inner, [(*first[:-1], 3), (*second[:-1], 12)], device)
        leaks = (
            torch.cat([swapped[len(second) - 1 :], swapped[: len(second) - 1]]) - packed,
            after_another[rows:] - packed[rows:],
            other_ends - packed,
        )
        if (leak := max(one.norm() for one in leaks) / size) > 1e-3:
            return f"packed hidden states depend on other sequences by {leak:.1e} of their size"
    return None if error <= limit else f"packed hidden states differ by {error:.1e} of their size"


def _hidden(inner: nn.Module, sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[N, D] of all tokens but the last of each sequence."""
    batch = TokenBatch.of(sequences, [1] * len(sequences), pad_id=0).to(device)
    return hidden_rows(inner, batch)
