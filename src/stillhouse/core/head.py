"""The last layer of a language model: what turns a hidden state into logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from stillhouse.core.sparse import SparseLogprobs

_EXCLUDES = WeakTensorKeyDictionary()
"""bias -> whether it holds -inf; a bias does not come to hold it by training."""


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

    @property
    def excludes(self) -> bool:
        """True if the bias takes entries out by -inf. A bias is read once, for which a GPU is waited for."""
        if self.bias is None:
            return False
        if self.bias not in _EXCLUDES:
            _EXCLUDES[self.bias] = bool(torch.isneginf(gathered(self.bias).detach()).any())
        return bool(_EXCLUDES[self.bias])

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

    def whole(self) -> ModelHead:
        """The same with its weights gathered where they are sharded; what takes it gathers nothing more."""
        bias = None if self.bias is None else gathered(self.bias)
        return replace(self, weight=gathered(self.weight), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Full logits [N, height], as plain differentiable operations: the twin of the fused path."""
        weight = self.weight[: self.height]
        bias = None if self.bias is None else self.bias[: self.height]
        return self.finish(nn.functional.linear(hidden, weight), bias)


@dataclass(frozen=True, slots=True, eq=False)
class ModelSignal:
    """What a teacher says about N rows: hidden states and the head that makes logits of them, or
    log-probabilities of a few tokens.

    Example: `ModelSignal(teacher.hidden(batch), teacher.head)`
    """

    signal: Tensor | SparseLogprobs | None
    """[N, D] hidden states, or sparse log-probabilities."""
    head: ModelHead | None = None
    """None with sparse log-probabilities."""


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
