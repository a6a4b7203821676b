"""The last layer of a language model: what turns a hidden state into logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class ModelHead:
    """logits = softcap tanh(scale (hidden weight^T + bias) / softcap).

    Example: `ModelHead(model.lm_head.weight, softcap=30.0, vocab=len(tokenizer))`
    """

    weight: Tensor
    """[V, D]; may be a DTensor (FSDP2), which is gathered once per call, and may be the input embedding."""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    """Multiplies the logits (Cohere, Granite)."""
    softcap: float | None = None
    """Bounds the logits smoothly (Gemma 2)."""
    vocab: int | None = None
    """How many rows, from the first, are ids of the tokenizer; the rest is padding. None: all."""

    @property
    def height(self) -> int:
        """The number of ids that count."""
        rows = int(self.weight.shape[0])
        return rows if self.vocab is None else min(self.vocab, rows)

    def finish(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """Logits [n, V] in fp32 (fp64 stays) from the bare matrix product; a new tensor unless nothing is to
        do."""
        logits = product.float() if product.dtype in (torch.float16, torch.bfloat16) else product
        if bias is not None:
            logits = logits + bias.to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d product, [n, V] or [1, 1]; None if it is one everywhere."""
        if self.softcap is not None:
            return (1 - (logits / self.softcap).square()).mul_(self.scale)
        return None if self.scale == 1.0 else logits.new_full((1, 1), self.scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """Full logits [N, height], as plain differentiable operations: the twin of the fused path."""
        weight = self.weight[: self.height]
        bias = None if self.bias is None else self.bias[: self.height]
        return self.finish(nn.functional.linear(hidden, weight), bias)


def as_head(head: ModelHead | Tensor) -> ModelHead:
    """A bare [V, D] weight as a head without extras."""
    return head if isinstance(head, ModelHead) else ModelHead(head)


def gathered(weight: Any) -> Tensor:
    """The whole weight of an FSDP2-sharded head, once; a plain tensor comes back as it is.

    The gradient goes back as each rank's own part, averaged over ranks: the convention of DDP and FSDP.
    """
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    ranks = weight.device_mesh.size()
    whole: Tensor = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / ranks)
    return whole
