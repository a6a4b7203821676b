"""Any objective over the language-model head, in chunks of rows: never the logits of all rows at once.

Per chunk: student and teacher logits by one matrix product each, then the objective and its gradient in
small blocks that stay in the cache, written over the student's logits; then the products that give the
gradients of hidden states and head. So backward has nothing left to recompute, and the price is four matrix
products and a little arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.alignment import TokenAlignment
from stillhouse.core.head import ModelHead, as_head, gathered
from stillhouse.core.host import RowIndex, as_host, known, to_device
from stillhouse.core.requirements import MAIN
from stillhouse.core.rows import Rows
from stillhouse.core.sparse import SparseLogprobs
from stillhouse.fused.cross_tokenizer import CrossTokenizerHeadLoss
from stillhouse.fused.kernel import (
    FusedConfig,
    FusedHeadLoss,
    Gradients,
    ModelOutput,
    RowBlock,
    operand_dtype,
)
from stillhouse.objectives.base import Objective, check_aligned, with_sparse

DEFAULT = FusedConfig()


def fused_loss(
    objective: Objective,
    student_hidden: Tensor,
    student_head: ModelHead | Tensor,
    teacher_hidden: Tensor | SparseLogprobs | None = None,
    teacher_head: ModelHead | Tensor | None = None,
    token_weight: Tensor | None = None,
    rows: Rows | None = None,
    config: FusedConfig = DEFAULT,
) -> Tensor:
    """The objective over hidden states and heads, as one number.

    Args:
        objective: any objective; its plain call on full logits is the definition that this equals.
        student_hidden: [N, Ds], gradient wanted or not.
        student_head: a [V, Ds] weight or a `ModelHead`; a frozen one gets no gradient and costs none.
        teacher_hidden: [N, Dt], or what a teacher says about a few tokens of each row, which needs no head;
            None if the objective needs no teacher.
        teacher_head: a [V', Dt] weight or a `ModelHead`. Of heads of different height the shared ids are
            compared.
        token_weight: [N]; None: each row counts 1 / N. Rows of weight 0 reach no head; a GPU is waited for
            to find them, unless `rows.loss_mask` tells.
        rows: labels, sources and the rest of what the objective needs, [N] each.
        config: memory budget and compilation.

    Returns:
        sum_n token_weight_n value_n, fp32 (fp64 for fp64 operands); backward works once, as gradients are
        ready.

    Raises:
        ValueError: something that the objective needs is missing, or shapes do not fit.
    """
    return fused_rows(
        objective, student_hidden, student_head, teacher_hidden, teacher_head, token_weight, rows, config
    )[0]


def fused_rows(
    objective: Objective,
    student_hidden: Tensor,
    student_head: ModelHead | Tensor,
    teacher_hidden: Tensor | SparseLogprobs | None = None,
    teacher_head: ModelHead | Tensor | None = None,
    token_weight: Tensor | None = None,
    rows: Rows | None = None,
    config: FusedConfig = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """As `fused_loss`, with the detached values of all rows, [N]; rows of weight 0 have value 0."""
    call = _call(
        objective, student_hidden, student_head, teacher_hidden, teacher_head, token_weight, rows, config
    )
    weight, bias = call.parameters
    inputs = [tensor for tensor in (student_hidden, weight, bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        loss, values = _Fused.apply(student_hidden, weight, bias, call)
        return loss, values
    with torch.no_grad():
        return call.run(student_hidden, weight, bias, (False, False, False))[:2]


def fused_label_facts(
    objective: Objective,
    student_hidden: Tensor,
    student_head: ModelHead | Tensor,
    teacher_hidden: Tensor | SparseLogprobs | None = None,
    teacher_head: ModelHead | Tensor | None = None,
    rows: Rows | None = None,
    config: FusedConfig = DEFAULT,
) -> Rows:
    """The rows with the label log-probabilities of both models and the likelihood gaps; no gradient.

    `fused_rows` does the same by itself where the objective is over sequences. This is for those who want the
    numbers too, or want them for a whole batch before its first loss. Rows that have them are not computed
    again.
    """
    call = _call(objective, student_hidden, student_head, teacher_hidden, teacher_head, None, rows, config)
    with torch.no_grad():
        return call.label_facts(student_hidden)


def _call(
    objective: Objective,
    student_hidden: Tensor,
    student_head: ModelHead | Tensor,
    teacher_hidden: Tensor | SparseLogprobs | None,
    teacher_head: ModelHead | Tensor | None,
    token_weight: Tensor | None,
    rows: Rows | None,
    config: FusedConfig,
) -> _Call:
    """The checked arguments of one call."""
    head, rows = as_head(student_head), rows or Rows()
    if objective.granularity == "sequence" and rows.alignment is None and rows.sequence_ids is not None:
        labels = to_device(np.zeros_like(rows.sequence_ids), student_hidden.device)
        labels = labels if rows.labels is None else rows.labels
        rows = replace(rows, labels=labels, alignment=TokenAlignment.identity(rows.sequence_ids))
    others: dict[str, ModelOutput] = {}
    exclude = head.excludes
    if isinstance(teacher_hidden, SparseLogprobs):
        rows = with_sparse(rows, teacher_hidden)
    elif objective.needs_teacher and teacher_hidden is not None and teacher_head is not None:
        others[MAIN] = ModelOutput.of(teacher_hidden, as_head(teacher_head))
        exclude = exclude or as_head(teacher_head).excludes
    for name in sorted(objective.other_models & rows.others.keys()):
        other = rows.others[name]
        assert isinstance(other.signal, Tensor)
        assert other.head is not None
        others[name] = ModelOutput.of(other.signal, other.head)
        exclude = exclude or other.head.excludes
    _check(objective, student_hidden, others, token_weight, rows)
    if token_weight is not None and rows.loss_mask is None:
        rows = replace(rows, loss_mask=as_host(token_weight != 0))
    operand = operand_dtype(student_hidden, head.weight)
    return _Call(objective, head, others, token_weight, rows, config, operand, exclude)


@dataclass(frozen=True, slots=True)
class _Call:
    """Everything of a call but the three tensors that autograd must see."""

    objective: Objective
    head: ModelHead
    others: dict[str, ModelOutput]
    token_weight: Tensor | None
    rows: Rows
    config: FusedConfig
    operand: torch.dtype
    exclude: bool
    """Whether a bias of a head may hold -inf."""

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the student's head, whole."""
        return gathered(self.head.weight), None if self.head.bias is None else gathered(self.head.bias)

    def label_facts(self, hidden: Tensor) -> Rows:
        """See `fused_label_facts`."""
        with torch.autocast(hidden.device.type, enabled=False):
            part = self._part(ModelOutput.of(hidden, self.head, self.operand))
            return FusedHeadLoss(part, self.config, (False, False, False), self.exclude).label_facts()

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The loss, the values of all rows, and the gradients that are wanted."""
        with torch.autocast(hidden.device.type, enabled=False):
            student = ModelOutput.of(hidden, replace(self.head, weight=weight, bias=bias), self.operand)
            part, index = self._counted(self._part(student))
            work = FusedHeadLoss if part.rows.alignment is None else CrossTokenizerHeadLoss
            loss, values, sums = work(part, self.config, needs, self.exclude).run()
        if index is not None:
            found, values = values, values.new_zeros(hidden.shape[0])
            values[index.device] = found
        gradients = (
            _spread(sums.hidden, hidden, index),
            _padded(sums.weight, weight),
            None if bias is None else _padded(sums.bias, bias),
        )
        return loss, values, gradients

    def _part(self, student: ModelOutput) -> RowBlock:
        """All rows."""
        others = self.others
        if others and self.objective.shares_vocabulary:
            height = min(side.weight.shape[0] for side in (student, *others.values()))
            student = student.cut(height)
            others = {name: side.cut(height) for name, side in others.items()}
        count = student.hidden.shape[0]
        exact = torch.promote_types(self.operand, torch.float32)
        rows = replace(self.rows, others={})
        weights = self.token_weight
        if weights is None:
            weights = torch.full((count,), 1 / max(1, count), dtype=exact, device=student.hidden.device)
        return RowBlock(self.objective, 1.0, student, others, rows, weights.detach().to(exact), None)

    def _counted(self, part: RowBlock) -> tuple[RowBlock, RowIndex | None]:
        """The rows that have weight, and which they are (None: all of them, or cut by groups later)."""
        mask = None if self.token_weight is None else part.rows.loss_mask
        if part.rows.alignment is not None or mask is None or mask.all():
            return replace(part, rows=replace(part.rows, loss_mask=mask)), None
        index = RowIndex.of(np.flatnonzero(mask), part.weights.device)
        return part.at(index), index


def _spread(gradient: Tensor | None, hidden: Tensor, index: RowIndex | None) -> Tensor | None:
    """The gradient for all rows from that for the rows that count."""
    if gradient is None or index is None:
        return None if gradient is None else gradient.to(hidden.dtype)
    whole = torch.zeros_like(hidden)
    whole[index.device] = gradient.to(hidden.dtype)
    return whole


def _padded(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient for the whole parameter from that for the ids that are compared; the rest gets zeros."""
    if gradient is None:
        return None
    gradient = gradient.to(parameter.dtype)
    if gradient.shape[0] == parameter.shape[0]:
        return gradient
    whole = torch.zeros_like(parameter)
    whole[: gradient.shape[0]] = gradient
    return whole


def _check(
    objective: Objective,
    student_hidden: Tensor,
    others: dict[str, ModelOutput],
    token_weight: Tensor | None,
    rows: Rows,
) -> None:
    if student_hidden.dim() != 2:
        raise ValueError(f"hidden states are [rows, width], got {list(student_hidden.shape)}")
    objective.check(MAIN in others, rows)
    count = student_hidden.shape[0]
    lengths = {name: side.hidden.shape[0] for name, side in others.items() if name != MAIN}
    if MAIN in others:
        check_aligned(objective, count, others[MAIN].hidden.shape[0], rows)
    lengths["rows"] = count if rows.count is None else rows.count
    lengths["token_weight"] = count if token_weight is None else token_weight.shape[0]
    for name, length in lengths.items():
        if length != count:
            raise ValueError(f"{name}: {length} rows, but the student has {count}")


class _Fused(torch.autograd.Function):
    """Gradients are computed in forward, where the logits are; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        loss, values, gradients = call.run(hidden, weight, bias, ctx.needs_input_grad[:3])
        ctx.gradients = gradients
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("fused_loss can be differentiated once; call it again for a second backward")
        gradients: Gradients = ctx.gradients
        ctx.gradients = None  # so that autograd may keep the tensors instead of copying them
        scale = upstream[0]
        if not known(scale == 1):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(scale)
        return (*gradients, None)
