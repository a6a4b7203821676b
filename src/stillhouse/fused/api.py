"""Any objective over the language-model head, in chunks of rows: never the logits of all rows at once.

Per chunk: student and teacher logits by one matrix product each, then the objective and its gradient in
small blocks that stay in the cache, written over the student's logits; then the products that give the
gradients of hidden states and head. So backward has nothing left to recompute, and the price is four matrix
products and a little arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.alignment import TokenAlignment
from stillhouse.core.head import ModelHead, ModelSignal, as_head, gathered
from stillhouse.core.host import RowIndex, as_host, known, to_device
from stillhouse.core.requirements import MAIN
from stillhouse.core.rows import Rows, Signal
from stillhouse.core.sparse import SparseLogprobs
from stillhouse.fused.config import FusedConfig
from stillhouse.fused.cross_tokenizer import CrossTokenizerHeadLoss
from stillhouse.fused.kernel import FusedHeadLoss, Gradients, RowBlock
from stillhouse.fused.products import ModelOutput, operand_dtype
from stillhouse.objectives.base import Objective, check_aligned

DEFAULT = FusedConfig()


def fused_loss(
    objective: Objective,
    student_hidden: Tensor,
    student_head: ModelHead | Tensor,
    teacher_hidden: Signal | Mapping[str, ModelSignal] | None = None,
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
            for several teachers each one's signal and head by its name; None if the objective needs none.
        teacher_head: a [V', Dt] weight or a `ModelHead`. Of heads of different height the shared ids are
            compared.
        token_weight: [N]; None: each row counts 1 / N. Rows of weight 0 reach no head; a GPU is waited for
            to find them, unless `rows.loss_mask` tells.
        rows: labels, sources and the rest of what the objective needs, [N] each.
        config: memory budget, precision and compilation.

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
    teacher_hidden: Signal | Mapping[str, ModelSignal] | None = None,
    teacher_head: ModelHead | Tensor | None = None,
    token_weight: Tensor | None = None,
    rows: Rows | None = None,
    config: FusedConfig = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """As `fused_loss`, with the detached values of all rows, [N]; rows of weight 0 have value 0."""
    call = _Call.of(
        objective, student_hidden, as_head(student_head), _named(teacher_hidden, teacher_head), rows, config
    ).weighted(token_weight, student_hidden.shape[0])
    weight, bias = call.parameters
    inputs = [tensor for tensor in (student_hidden, weight, bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        loss, values = _FusedFunction.apply(student_hidden, weight, bias, call)
        return loss, values
    with torch.no_grad():
        return call.run(student_hidden, weight, bias, (False, False, False))[:2]


def fused_label_facts(
    objective: Objective,
    student_hidden: Tensor,
    student_head: ModelHead | Tensor,
    teacher_hidden: Signal | Mapping[str, ModelSignal] | None = None,
    teacher_head: ModelHead | Tensor | None = None,
    rows: Rows | None = None,
    config: FusedConfig = DEFAULT,
) -> Rows:
    """The rows with the label log-probabilities of all models and the likelihood gaps; no gradient.

    `fused_rows` does the same by itself where the objective is over sequences. This is for those who want the
    numbers too, or want them for a whole batch before its first loss. Rows that have them are not computed
    again.
    """
    call = _Call.of(
        objective, student_hidden, as_head(student_head), _named(teacher_hidden, teacher_head), rows, config
    )
    with torch.no_grad():
        return call.label_facts(student_hidden)


def _named(
    signal: Signal | Mapping[str, ModelSignal] | None, head: ModelHead | Tensor | None
) -> dict[str, ModelSignal]:
    """The teachers of a call by name."""
    if isinstance(signal, Mapping):
        return dict(signal)
    if signal is None or (isinstance(signal, Tensor) and head is None):
        return {}
    return {MAIN: ModelSignal(signal, None if head is None else as_head(head))}


@dataclass(frozen=True, slots=True)
class _Call:
    """Everything of a call but the three tensors that autograd must see; checked."""

    objective: Objective
    head: ModelHead
    teachers: dict[str, ModelOutput]
    """Those that give hidden states; what the others say is in `rows`."""
    rows: Rows
    config: FusedConfig
    operand: torch.dtype
    exclude: bool
    """Whether a bias of a head may hold -inf."""
    token_weight: Tensor | None = None

    @classmethod
    def of(
        cls,
        objective: Objective,
        hidden: Tensor,
        head: ModelHead,
        signals: Mapping[str, ModelSignal],
        rows: Rows | None,
        config: FusedConfig,
    ) -> _Call:
        """Without weights: each row counts the same."""
        rows = rows or Rows()
        if objective.granularity == "sequence" and rows.alignment is None and rows.sequence_ids is not None:
            labels = rows.labels
            if labels is None:
                labels = to_device(np.zeros_like(rows.sequence_ids), hidden.device)
            rows = replace(rows, labels=labels, alignment=TokenAlignment.identity(rows.sequence_ids))
        asked = objective.requirements().model_names
        signals = {name: one for name, one in sorted(signals.items()) if name in asked}
        facts = {name: replace(one, signal=None) for name, one in rows.teachers.items()}
        rows = replace(rows, teachers=facts).with_signals(
            {name: one.signal for name, one in signals.items() if isinstance(one.signal, SparseLogprobs)}
        )
        teachers = {
            name: ModelOutput.of(one.signal, one.head)
            for name, one in signals.items()
            if isinstance(one.signal, Tensor) and one.head is not None
        }
        exclude = head.excludes or any(one.head.excludes for one in teachers.values())
        call = cls(objective, head, teachers, rows, config, operand_dtype(hidden, head.weight), exclude)
        call._check(hidden)
        return call

    def _check(self, hidden: Tensor) -> None:
        if hidden.dim() != 2:
            raise ValueError(f"hidden states are [rows, width], got {list(hidden.shape)}")
        sparse = {name for name, facts in self.rows.teachers.items() if facts.signal is not None}
        self.objective.check(self.rows, self.teachers.keys() | sparse)
        count = hidden.shape[0]
        if MAIN in self.teachers:
            check_aligned(self.objective, count, self.teachers[MAIN].hidden.shape[0], self.rows)
        lengths = {name: one.hidden.shape[0] for name, one in self.teachers.items() if name != MAIN}
        lengths["rows"] = count if self.rows.count is None else self.rows.count
        _check_lengths(count, lengths)

    def weighted(self, token_weight: Tensor | None, count: int) -> _Call:
        """With a weight for each of `count` rows."""
        if token_weight is None:
            return self
        _check_lengths(count, {"token_weight": token_weight.shape[0]})
        mask = as_host(token_weight != 0) if self.rows.loss_mask is None else self.rows.loss_mask
        return replace(self, token_weight=token_weight, rows=replace(self.rows, loss_mask=mask))

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the student's head, whole."""
        return gathered(self.head.weight), None if self.head.bias is None else gathered(self.head.bias)

    def label_facts(self, hidden: Tensor) -> Rows:
        """See `fused_label_facts`."""
        with torch.autocast(hidden.device.type, enabled=False):
            block = self._all_rows(ModelOutput.of(hidden, self.head, self.operand))
            return FusedHeadLoss(block, self.config, (False, False, False), self.exclude).label_facts()

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The loss, the values of all rows, and the gradients that are wanted."""
        with torch.autocast(hidden.device.type, enabled=False):
            student = ModelOutput.of(hidden, replace(self.head, weight=weight, bias=bias), self.operand)
            block, index = self._weighted_rows(self._all_rows(student))
            kind = FusedHeadLoss if block.rows.alignment is None else CrossTokenizerHeadLoss
            loss, values, grads = kind(block, self.config, needs_grad, self.exclude).run()
        if index is not None:
            found, values = values, values.new_zeros(hidden.shape[0])
            values[index.on(values.device)] = found
        gradients = (
            _for_all_rows(grads.hidden, hidden, index),
            _for_all_ids(grads.weight, weight),
            None if bias is None else _for_all_ids(grads.bias, bias),
        )
        return loss, values, gradients

    def _all_rows(self, student: ModelOutput) -> RowBlock:
        teachers, shared = self.teachers, self.objective.requirements().same_tokenizer
        compared = [student, *(one for name, one in teachers.items() if name in shared)]
        if len(compared) > 1:
            height = min(one.height for one in compared)
            student = student.cut(height)
            teachers = {name: one.cut(height) if name in shared else one for name, one in teachers.items()}
        exact, count = torch.promote_types(self.operand, torch.float32), student.hidden.shape[0]
        weight = self.token_weight
        if weight is None:
            weight = torch.full((count,), 1 / max(1, count), dtype=exact, device=student.hidden.device)
        return RowBlock(self.objective, 1.0, student, teachers, self.rows, weight.detach().to(exact), None)

    def _weighted_rows(self, block: RowBlock) -> tuple[RowBlock, RowIndex | None]:
        """The rows that have weight, and which they are (None: all of them, or cut by groups later)."""
        mask = None if self.token_weight is None else block.rows.loss_mask
        if block.rows.alignment is not None or mask is None or mask.all():
            return replace(block, rows=replace(block.rows, loss_mask=mask)), None
        index = RowIndex.of(np.flatnonzero(mask))
        return block.at(index), index


def _check_lengths(count: int, lengths: Mapping[str, int]) -> None:
    for name, length in lengths.items():
        if length != count:
            raise ValueError(f"{name}: {length} rows, but the student has {count}")


def _for_all_rows(gradient: Tensor | None, hidden: Tensor, index: RowIndex | None) -> Tensor | None:
    """The gradient for all rows from that for the rows that have weight."""
    if gradient is None or index is None:
        return None if gradient is None else gradient.to(hidden.dtype)
    whole = torch.zeros_like(hidden)
    whole[index.on(hidden.device)] = gradient.to(hidden.dtype)
    return whole


def _for_all_ids(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient for the whole parameter from that for the ids that are compared; the rest gets zeros."""
    if gradient is None:
        return None
    gradient = gradient.to(parameter.dtype)
    if gradient.shape[0] == parameter.shape[0]:
        return gradient
    whole = torch.zeros_like(parameter)
    whole[: gradient.shape[0]] = gradient
    return whole


class _FusedFunction(torch.autograd.Function):
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
