"""The work of one fused call: which rows, which chunks, which products.

Knows no autograd graph outside a block."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config import Bytes, StrictConfig
from stillhouse.core.head import ModelHead, gathered
from stillhouse.core.host import Ints, RowIndex
from stillhouse.core.requirements import MAIN
from stillhouse.core.rows import Rows, with_gaps
from stillhouse.objectives.base import Objective, aligned, label_logprobs

HALF = (torch.float16, torch.bfloat16)
BLOCK_ENTRIES_CPU = 2**19
"""Logits of one block on a CPU: so few that the temporaries of the arithmetic stay in its cache."""
BLOCK_ENTRIES = 2**26
"""Elsewhere blocks are large, so that starting kernels costs nothing."""
SLAB_ROWS_CPU, SLAB_ROWS = 128, 1024
"""Rows for which a teacher's logits are there at a time; the student's are kept until the chunk ends."""
TILE = 8192
"""Head rows of which the gradient is summed at a time where the sum is kept in fp32."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""For hidden states, head weight and head bias."""
Arithmetic = Callable[[Tensor, "Tensor | None", Rows], tuple[Tensor, Tensor]]


class FusedConfig(StrictConfig):
    """How the loss over the language-model head is cut into chunks. It does not depend on that, up to
    rounding.

    Example: `train: {fused: {memory_budget: 1GiB}}`
    """

    memory_budget: Bytes = 192 * 2**20
    """Memory for the student's logits of one chunk, such as 192MiB; each teacher's take at most the same, a
    CPU less."""
    chunk_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows of a chunk; default: as many as the budget allows, evenly."""
    fp32_logits: bool = False
    """Keep fp32 logits of half-precision operands on a CPU too, where only a product of fp32 copies gives
    them: slower. Without it a CPU rounds each logit once to the precision of the operands, as the model's
    own head does."""
    compile: bool = False
    """Run the definition of the objective through `torch.compile` instead of its closed form. On the CPUs
    tried the closed forms were faster."""

    def chunk_size(self, count: int, bytes_per_row: int) -> int:
        """How many of `count` rows make a chunk: the fewest chunks that fit the budget, of even size."""
        if self.chunk_rows is not None:
            return self.chunk_rows
        fit = max(1, self.memory_budget // max(1, bytes_per_row))
        chunks = max(1, -(-count // fit))
        return max(1, -(-count // chunks))


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """One model of a call: hidden states, and the head over the ids that are compared, ready to multiply."""

    hidden: Tensor
    head: ModelHead
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, head: ModelHead, operand: torch.dtype | None = None) -> ModelOutput:
        """Detached and gathered, in the given precision or that of its own operands."""
        weight = gathered(head.weight).detach()
        bias = None if head.bias is None else gathered(head.bias).detach()[: head.height]
        operand = operand or operand_dtype(hidden, weight)
        return cls(hidden.detach().to(operand), head, weight[: head.height].to(operand), bias)

    def cut(self, height: int) -> ModelOutput:
        """Over the first `height` ids only: softmax over them renormalises the mass."""
        bias = None if self.bias is None else self.bias[:height]
        return replace(self, weight=self.weight[:height], bias=bias)

    def at(self, index: RowIndex) -> ModelOutput:
        """For some of the rows."""
        return replace(self, hidden=self.hidden[index.device])

    def product(self, fp32: bool) -> Tensor:
        """hidden weight^T, [n, V], in fp32 where the device can or `fp32` insists, else as the operands."""
        if self.weight.dtype in HALF:
            if self.hidden.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
                return torch.mm(self.hidden, self.weight.t(), out_dtype=torch.float32)
            if fp32:
                return torch.mm(self.hidden.float(), self.weight.t().float())
        return torch.mm(self.hidden, self.weight.t())

    def logits(self, product: Tensor) -> Tensor:
        """Logits in fp32 or fp64 from some rows of `product`."""
        return self.head.finish(product, self.bias)


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of the matrix products: that of autocast where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class GradAccumulator:
    """The gradients of a call while they grow, over the ids that are compared."""

    def __init__(
        self, student: ModelOutput, needs: tuple[bool, bool, bool], exact: torch.dtype, chunks: int
    ) -> None:
        weight = student.weight
        # One chunk is one product, rounded once; several are summed in fp32 so that late ones are not lost.
        dtype = exact if chunks > 1 and weight.dtype in HALF else weight.dtype
        self.hidden = torch.zeros_like(student.hidden) if needs[0] else None
        # Not filled with zeros: the first chunk writes, the others add.
        self.weight = torch.empty_like(weight, dtype=dtype) if needs[1] else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=exact) if needs[2] else None
        self._empty = True

    def add(self, gradient: Tensor, student: ModelOutput, rows: Tensor | slice) -> None:
        """Add a chunk: its gradient for the products [n, V], and the rows of the call that it covers."""
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(gradient, student.weight)
        if self.weight is None:
            return
        if self.weight.dtype == gradient.dtype:
            if self._empty:
                torch.mm(gradient.t(), student.hidden, out=self.weight)
            else:
                self.weight.addmm_(gradient.t(), student.hidden)
        else:
            if self._empty:
                self.weight.zero_()
            for start in range(0, gradient.shape[1], TILE):
                tile = slice(start, start + TILE)
                self.weight[tile] += torch.mm(gradient[:, tile].t(), student.hidden)
        self._empty = False

    def finish(self) -> None:
        """Make sure that a gradient to which no chunk came is zero."""
        if self._empty and self.weight is not None:
            self.weight.zero_()


@functools.cache
def _let_the_heap_keep_what_is_freed() -> None:
    """Once per process: free one allocation of 31 MiB, so that glibc serves temporaries from its heap.

    glibc raises its limits for mapping and trimming to the largest mapped block that it saw freed (at most
    32 MiB). Without this every temporary of every block is fresh zeroed pages: a third of the arithmetic's
    time.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


@functools.lru_cache(maxsize=32)
def _compiled(objective: Objective) -> Arithmetic:
    per_token = torch.compile(objective.per_token, dynamic=False)

    def arithmetic(student: Tensor, teacher: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            value = per_token(leaf, teacher, rows)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    return arithmetic


@dataclass(slots=True)
class RowBlock:
    """Rows of a call that share an objective: models, facts, weights, and how gradients reach them."""

    objective: Objective
    share: float
    student: ModelOutput
    others: dict[str, ModelOutput]
    rows: Rows
    weights: Tensor
    through_label: Tensor | None
    """[n]: the gradient for the log-probability of each label, from the part over whole sequences."""

    def at(self, index: RowIndex | slice) -> RowBlock:
        """Some of its rows."""
        if isinstance(index, slice):
            index = RowIndex.run(index)
        return RowBlock(
            self.objective,
            self.share,
            self.student.at(index),
            {name: side.at(index) for name, side in self.others.items()},
            self.rows[index],
            self.weights[index.device],
            None if self.through_label is None else self.through_label[index.device],
        )

    def trimmed(self) -> RowBlock:
        """Without models that its objective does not look at, so that they are not multiplied for nothing."""
        asked = self.objective.requirements().model_names
        wanted = asked if self.objective.has_token_part else frozenset()
        return replace(self, others={name: side for name, side in self.others.items() if name in wanted})


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Consecutive rows that share an objective."""

    objective: Objective
    share: float
    rows: slice

    def within(self, chunk: slice) -> RowSpan:
        """What of it lies in a chunk, counted from the chunk's start; maybe nothing."""
        start, stop = max(self.rows.start, chunk.start), min(self.rows.stop, chunk.stop)
        return replace(self, rows=slice(start - chunk.start, max(start, stop) - chunk.start))


class FusedHeadLoss:
    """One call. `run` returns the loss, the values of all rows, and the gradients that are wanted."""

    def __init__(
        self, part: RowBlock, config: FusedConfig, needs: tuple[bool, bool, bool], exclude: bool
    ) -> None:
        if part.weights.device.type == "cpu":
            _let_the_heap_keep_what_is_freed()
        self.part = part
        self.config = config
        self.needs = needs
        self.exclude = exclude
        self.exact = torch.promote_types(part.student.weight.dtype, torch.float32)
        itemsize = part.student.weight.dtype.itemsize
        row_bytes = part.student.weight.shape[0] * itemsize
        self.chunk_rows = config.chunk_size(part.weights.shape[0], row_bytes)

    def run(self) -> tuple[Tensor, Tensor, GradAccumulator]:
        """See the class."""
        part = self.part
        count = part.weights.shape[0]
        values = torch.zeros(count, dtype=self.exact, device=part.weights.device)
        if part.objective.sequence_level:
            values += self._over_sequences()
        spans, order = self._spans()
        ordered = part.at(order)
        active = spans[-1].rows.stop if spans else 0
        sums = GradAccumulator(part.student, self.needs, self.exact, -(-active // self.chunk_rows))
        for chunk in _cut(0, active, self.chunk_rows):
            where = order[chunk].device
            inside = [span.within(chunk) for span in spans]
            values[where] += self._chunk(ordered.at(chunk), inside, sums, where)
        sums.finish()
        return (values * part.weights).sum(), values, sums

    def _spans(self) -> tuple[list[RowSpan], RowIndex]:
        """Which objective is for which rows once sorted by that, and the rows in that order."""
        part, spans, found, at = self.part, list[RowSpan](), list[Ints](), 0
        for share, objective, index in part.objective.split(part.rows):
            if objective.has_token_part or part.through_label is not None:
                found.append(np.arange(part.weights.shape[0]) if index is None else index)
                spans.append(RowSpan(objective, share, slice(at, at + len(found[-1]))))
                at += len(found[-1])
        order = np.concatenate(found) if found else np.arange(0)
        return spans, RowIndex.of(order, part.weights.device)

    def _chunk(
        self, chunk: RowBlock, spans: list[RowSpan], sums: GradAccumulator, where: Tensor | slice
    ) -> Tensor:
        """Values of the rows of one chunk; its gradients go into `sums`."""
        fp32 = self.config.fp32_logits
        product = chunk.student.product(fp32)
        gradient = None
        if any(self.needs):
            operand = chunk.student.weight.dtype
            gradient = product if product.dtype == operand else torch.empty_like(product, dtype=operand)
        on_cpu = product.device.type == "cpu"
        slab_rows = SLAB_ROWS_CPU if on_cpu else SLAB_ROWS
        block_rows = max(1, (BLOCK_ENTRIES_CPU if on_cpu else BLOCK_ENTRIES) // product.shape[1])
        values = []
        for span in spans:
            piece = replace(chunk, objective=span.objective, share=span.share).trimmed()
            for slab in _cut(span.rows.start, span.rows.stop, slab_rows):
                here = RowIndex.run(slab)
                others = {name: side.at(here).product(fp32) for name, side in piece.others.items()}
                for block in _cut(slab.start, slab.stop, block_rows):
                    inside = slice(block.start - slab.start, block.stop - slab.start)
                    logits = {name: piece.others[name].logits(raw[inside]) for name, raw in others.items()}
                    out = None if gradient is None else gradient[block]
                    values.append(self._block(piece.at(block), product[block], logits, out, sums))
        if gradient is not None:
            sums.add(gradient, chunk.student, where)
        return torch.cat(values)

    def _block(
        self,
        piece: RowBlock,
        product: Tensor,
        others: dict[str, Tensor],
        out: Tensor | None,
        sums: GradAccumulator,
    ) -> Tensor:
        """Values of a few rows; the gradient for their products is written to `out`."""
        objective, rows = piece.objective, piece.rows
        student = piece.student.logits(product)
        if self.exclude and others:
            student, *cut = aligned(student, tuple(others.values()), objective.shares_vocabulary)
            others = dict(zip(others, cut, strict=True))
        elif self.exclude:
            (student,) = aligned(student, (), objective.shares_vocabulary)
        if len(others) > 1 or (others and MAIN not in others):
            rows = replace(rows, model_logits={name: one for name, one in others.items() if name != MAIN})
        sparse = rows.compact is not None and objective.teacher_model == MAIN
        teacher, rows = objective.teacher_of(others.get(MAIN), rows), objective.rows_of(rows)
        if out is None:
            if not objective.has_token_part:
                return student.new_zeros(student.shape[0])
            if sparse and rows.compact is not None:
                return piece.share * objective.per_token_sparse(student, rows.compact, rows)
            return piece.share * objective.per_token(student, teacher, rows)
        slope = piece.student.head.slope(student)
        through = None
        if piece.through_label is not None:
            through = label_gradient(student, rows, piece.through_label)
        if objective.has_token_part:
            arithmetic = _compiled(objective) if self.config.compile else objective.value_and_gradient
            if sparse:
                arithmetic = objective.sparse_value_and_gradient
            value, gradient = arithmetic(student, teacher, rows)
            gradient.mul_((piece.share * piece.weights)[:, None])
            gradient = gradient if through is None else gradient.add_(through)
        else:
            assert through is not None
            value, gradient = student.new_zeros(student.shape[0]), through
        if slope is not None:
            gradient.mul_(slope)
        if sums.bias is not None:
            sums.bias += gradient.sum(0)
        out.copy_(gradient)
        return piece.share * value

    def label_facts(self) -> Rows:
        """The rows with the label log-probabilities of both models, and the gaps that follow from them.

        What the rows bring along is not computed again.
        """
        part = self.part
        if part.rows.labels is None:
            raise ValueError("log-probabilities of labels need labels")
        ours, theirs = part.rows.student_logprobs, part.rows.teacher_logprobs
        if ours is None:
            ours = self._label_logprobs(part.student)
        if theirs is None and MAIN in part.others:
            theirs = self._label_logprobs(part.others[MAIN])
        more = {
            name: self._label_logprobs(side)
            for name, side in part.others.items()
            if name != MAIN and name not in part.rows.model_logprobs
        }
        known = {**part.rows.model_logprobs, **more}
        found = replace(part.rows, student_logprobs=ours, teacher_logprobs=theirs, model_logprobs=known)
        return with_gaps(found)

    def _over_sequences(self) -> Tensor:
        """Fill in label log-probabilities; values [N] that depend on whole sequences, and their gradient for
        labels."""
        part = self.part
        part.rows = self.label_facts()
        if not part.objective.has_sequence_part:
            return torch.zeros_like(part.weights)
        with torch.enable_grad():
            leaf = part.rows.student_logprobs.detach().requires_grad_()  # type: ignore[union-attr]
            values = part.objective.per_sequence(replace(part.rows, student_logprobs=leaf))
            if any(self.needs) and values.requires_grad:
                (part.through_label,) = torch.autograd.grad((values * part.weights).sum(), leaf)
        return values.detach()

    def _label_logprobs(self, side: ModelOutput) -> Tensor:
        labels = self.part.rows.labels
        assert labels is not None
        found = []
        for start in range(0, labels.shape[0], self.chunk_rows):
            chunk = slice(start, start + self.chunk_rows)
            product = side.at(RowIndex.run(chunk)).product(self.config.fp32_logits)
            size = max(1, BLOCK_ENTRIES_CPU // product.shape[1])
            for row in range(0, product.shape[0], size):
                block = side.logits(product[row : row + size])
                found.append(label_logprobs(block, labels[chunk][row : row + size]))
        return torch.cat(found)


def _cut(start: int, stop: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover start to stop."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def label_gradient(student: Tensor, rows: Rows, coefficient: Tensor) -> Tensor:
    """coefficient times the gradient of the label's log-probability for the logits: [i = label] - q_i."""
    assert rows.labels is not None
    gradient = torch.softmax(student, -1).mul_(-coefficient[:, None])
    return gradient.scatter_add_(1, rows.labels[:, None], coefficient[:, None])
