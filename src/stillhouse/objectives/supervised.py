"""Objectives that learn from the tokens themselves."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from stillhouse.core.requirements import Requirements
from stillhouse.core.rows import Rows
from stillhouse.objectives.base import Objective
from stillhouse.objectives.divergences import log_normaliser
from stillhouse.objectives.kernels import KernelTerm
from stillhouse.objectives.logits import label_logprobs
from stillhouse.objectives.registry import register


@register
class CrossEntropy(Objective):
    """Negative log-likelihood of the response tokens: supervised fine-tuning, SeqKD, and the plain-text loss.

    Equation: -log q(y), y the label of the row.
    Gradient: q_i - [i = y].
    Character: covering; it is forward KL from a teacher that puts all mass on one token.
    When: references, teacher text without a teacher at hand (SeqKD), or plain text beside a distillation
        loss.
    Source: Kim and Rush 2016 (arXiv 1606.07947) for its use on teacher text.
    """

    kind: Literal["cross_entropy"] = "cross_entropy"
    divergence: ClassVar[bool] = False

    def requirements(self) -> Requirements:
        return Requirements(rows=frozenset({"labels"}))

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert rows.labels is not None
        return -label_logprobs(student, rows.labels)

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        return (KernelTerm(label_weight=1.0, teacher_model=None),)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert rows.labels is not None
        q, labels = torch.softmax(student, -1), rows.labels[:, None]
        picked = student.gather(-1, labels)
        value = (log_normaliser(student, q) - picked).squeeze(-1)
        return value, q.scatter_add_(1, labels, q.new_full((1, 1), -1.0).expand_as(picked))
