"""What objectives do with logits before and after their definition: excluded entries, labels, gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stillhouse.core.host import known
from stillhouse.core.rows import Rows, with_gaps
from stillhouse.core.sparse import EXCLUDED


def without_excluded(
    student: Tensor, teachers: Mapping[str, Tensor], same_vocabulary: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Take entries that are -inf in one of several models out of all; on a CPU finite logits come back as
    they are.

    Teachers of another vocabulary only lose their own.
    """
    masks = {name: torch.isneginf(logits) for name, logits in teachers.items()}
    own = torch.isneginf(student.detach())
    shared = torch.stack([own, *(mask for name, mask in masks.items() if name in same_vocabulary)]).any(0)

    def cut(logits: Tensor, mask: Tensor) -> Tensor:
        return logits if known(mask.any()) is False else logits.masked_fill(mask, EXCLUDED)

    return cut(student, shared), {
        name: cut(logits, shared if name in same_vocabulary else masks[name])
        for name, logits in teachers.items()
    }


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label], [N] nats."""
    return logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)


def with_logprobs(student: Tensor, rows: Rows) -> Rows:
    """Rows with the log-probabilities of their labels under student and teachers."""
    if rows.labels is None:
        raise ValueError("objectives over sequences need labels")
    teachers = {
        name: replace(facts, label_logprobs=label_logprobs(facts.signal, rows.labels))
        if facts.label_logprobs is None and isinstance(facts.signal, Tensor) and rows.shares_labels(name)
        else facts
        for name, facts in rows.teachers.items()
    }
    return with_gaps(replace(rows, student_logprobs=label_logprobs(student, rows.labels), teachers=teachers))


def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The number of `value` with the gradient of `surrogate`."""
    return value.detach() + surrogate - surrogate.detach()


def differentiated(student: Tensor, value_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Values and the gradient of their sum for the student's logits."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        value = value_of(leaf)
        if not value.requires_grad:
            return value, torch.zeros_like(student)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def raised(logits: Tensor) -> Tensor:
    if logits.dim() != 2:
        raise ValueError(f"logits are [rows, vocabulary], got {list(logits.shape)}")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
