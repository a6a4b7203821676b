"""Losses that others compute: as released code forms them on full logits, TRL's and Liger's chunked ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PEERS = {"trl": {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}, "liger": {"jsd": 0.5}}
"""By peer: the objectives that it has, with the weight of its generalised JSD that gives each."""
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of the student's hidden states and head and the teacher's, rows that count alone: the mean over rows."""


def peer(name: str, kind: str, labels: Tensor, compiled: bool = False) -> Loss | None:
    """TRL's or Liger's chunked loss; None where it cannot be imported or has no such loss."""
    if kind not in PEERS[name]:
        return None
    beta = PEERS[name][kind]
    try:
        if name == "trl":
            from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

            def trl(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
                operands = (hidden, head, None, teacher, teacher_head, None, beta)
                return ChunkedDivergenceFunction.apply(*operands)[0].mean()

            return trl
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

        def liger(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
            options = (None, None, 0.0, 1.0, beta, -100, 1.0, compiled)
            return LigerFusedLinearJSDFunction.apply(hidden, head, teacher, teacher_head, labels, *options)

        return liger
    except ImportError:
        return None


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32)


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=torch.float32)


def _forward(student: Tensor, teacher: Tensor, infinite: Tensor) -> Tensor:
    return -(_softmax(teacher) * _log_softmax(student)).masked_fill(infinite, 0).sum(-1)


def _reverse(student: Tensor, teacher: Tensor, infinite: Tensor) -> Tensor:
    q = _softmax(student)
    gap = (q * _log_softmax(teacher)).masked_fill(infinite, 0)
    return -(gap - (q * _log_softmax(student)).masked_fill(infinite, 0)).sum(-1)


def _skew_reverse(student: Tensor, teacher: Tensor, infinite: Tensor, share: float = 0.9) -> Tensor:
    q = _softmax(student)
    mixed = (share * _softmax(teacher) + (1 - share) * q).log()
    gap = (q * mixed).masked_fill(infinite, 0)
    return -(gap - (q * _log_softmax(student)).masked_fill(infinite, 0)).sum(-1)


def _skew(student: Tensor, teacher: Tensor, infinite: Tensor) -> Tensor:
    p = _softmax(teacher)
    return -(p * (0.1 * p + 0.9 * _softmax(student)).log()).masked_fill(infinite, 0).sum(-1)


def _jensen(student: Tensor, teacher: Tensor, infinite: Tensor) -> Tensor:
    p, q = _softmax(teacher), _softmax(student)
    mixed = (0.5 * p + 0.5 * q).log()
    one = (q * mixed).masked_fill(infinite, 0) - (q * _log_softmax(student)).masked_fill(infinite, 0)
    two = (p * mixed).masked_fill(infinite, 0) - (p * _log_softmax(teacher)).masked_fill(infinite, 0)
    return -0.5 * one.sum(-1) - 0.5 * two.sum(-1)


FULL = {
    "forward_kl": _forward,
    "reverse_kl": _reverse,
    "skew_kl": _skew,
    "skew_rkl": _skew_reverse,
    "jsd": _jensen,
}
"""Per row, from full logits of student and teacher and the places of infinite ones."""
