"""Objectives for models that do not share a vocabulary."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.alignment import TokenAlignment
from stillhouse.core.requirements import Requirements
from stillhouse.core.rows import Rows
from stillhouse.objectives.base import Objective
from stillhouse.objectives.divergences import dot
from stillhouse.objectives.registry import register


def ranked(logits: Tensor, size: int) -> Tensor:
    """Probabilities from the largest to the smallest, [N, size], padded with zeros."""
    probabilities = torch.softmax(logits, -1).sort(-1, descending=True).values
    return torch.nn.functional.pad(probabilities, (0, size - logits.shape[-1]))


def ascending(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted values, smallest first, and where each came from, [N, V] both.

    On a CPU in fp32 value and place are sorted as one integer, which numpy does ten times faster than torch
    sorts: the bits of positive floats have the order of the floats.
    """
    if probabilities.device.type != "cpu" or probabilities.dtype != torch.float32:
        return probabilities.sort(-1)
    bits = probabilities.numpy().view(np.uint32)
    keys = bits.astype(np.uint64)
    keys <<= 32
    keys |= np.arange(bits.shape[-1], dtype=np.uint64)
    keys.sort(axis=-1)
    place = torch.from_numpy((keys & np.uint64(0xFFFFFFFF)).view(np.int64))
    keys >>= 32
    return torch.from_numpy(keys.astype(np.uint32).view(np.float32)), place


def ascending_values(probabilities: Tensor) -> Tensor:
    """Sorted values alone, smallest first."""
    if probabilities.device.type != "cpu":
        return probabilities.sort(-1).values
    return torch.from_numpy(np.sort(probabilities.numpy(), axis=-1))


@register
class ULD(Objective):
    """Universal logit distillation: compares sorted probabilities, so that vocabularies may differ.

    Equation: sum_k |q_(k) - p_(k)|, where (k) is the k-th largest probability of each model; zeros are
        padded. Where tokenizers differ: at the first row of each group of tokens that spell the same bytes,
        where both models know the same text; zero at the other rows.
    Gradient: q_i (s_i - sum_j q_j s_j), s the sign of the difference at the rank of i.
    Character: matches how sure the teacher is, not of what: it is blind to which token is which.
    When: tokenizers that differ, together with cross-entropy.
    Source: ULD (arXiv 2402.12030), the sorted closed form. The paper compares the n-th row with the n-th,
        whatever text precedes them.
    """

    kind: Literal["uld"] = "uld"

    def requirements(self) -> Requirements:
        needs = self.compared_with("distribution", same_tokenizer=False)
        return needs | Requirements(granularity="group")

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        if rows.alignment is None:
            return self._distance(student, teacher)
        ours, theirs = _starts(rows.alignment, student.device)
        value = self._distance(student[ours], teacher[theirs])
        return student.new_zeros(student.shape[0]).index_put((ours,), value)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        if rows.alignment is None:
            return self._closed(student, teacher)
        ours, theirs = _starts(rows.alignment, student.device)
        value, gradient = self._closed(student[ours], teacher[theirs])
        count = student.shape[0]
        return (
            student.new_zeros(count).index_copy_(0, ours, value),
            student.zero_().index_copy_(0, ours, gradient),
        )

    @staticmethod
    def _distance(student: Tensor, teacher: Tensor) -> Tensor:
        size = max(student.shape[-1], teacher.shape[-1])
        return (ranked(student, size) - ranked(teacher, size)).abs().sum(-1)

    @staticmethod
    def _closed(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.softmax(student, -1)
        theirs = ascending_values(torch.softmax(teacher, -1))
        ours, place = ascending(q)
        size = max(ours.shape[-1], theirs.shape[-1])
        difference = torch.nn.functional.pad(ours, (size - ours.shape[-1], 0))
        difference = difference - torch.nn.functional.pad(theirs, (size - theirs.shape[-1], 0))
        sign = torch.sign(difference)
        value = dot(sign, difference)
        force = torch.empty_like(q).scatter_(-1, place, sign[:, size - ours.shape[-1] :])
        return value, force.sub_(dot(q, force)[:, None]).mul_(q)


def _starts(alignment: TokenAlignment, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of both models at which a group starts."""
    ours, theirs = alignment.members(device)
    return ours.anchors, theirs.anchors
