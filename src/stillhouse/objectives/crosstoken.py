"""Objectives for models that do not share a vocabulary."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from stillhouse.objectives.base import Objective, register
from stillhouse.objectives.rows import Rows


def ranked(logits: Tensor, size: int) -> Tensor:
    """Probabilities from the largest to the smallest, [N, size], padded with zeros."""
    probabilities = torch.softmax(logits, -1).sort(-1, descending=True).values
    return torch.nn.functional.pad(probabilities, (0, size - logits.shape[-1]))


@register
class ULD(Objective):
    """Universal logit distillation: compares sorted probabilities, so that vocabularies may differ.

    Equation: sum_k |q_(k) - p_(k)|, where (k) is the k-th largest probability of each model; zeros are
        padded.
    Gradient: q_i (s_i - sum_j q_j s_j), s the sign of the difference at the rank of i.
    Character: matches how sure the teacher is, not of what: it is blind to which token is which.
    When: tokenizers that differ, together with cross-entropy. The rows of both models have to be aligned
        before.
    Source: ULD (arXiv 2402.12030), the sorted closed form.
    """

    kind: Literal["uld"] = "uld"
    same_vocabulary: ClassVar[bool] = False

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        size = max(student.shape[-1], teacher.shape[-1])
        return (ranked(student, size) - ranked(teacher, size)).abs().sum(-1)
