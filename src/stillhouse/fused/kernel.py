"""One call of the loss over the head: chunks of rows, their products, values and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.host import Ints, RowIndex
from stillhouse.core.rows import Rows, TeacherRows, with_gaps
from stillhouse.fused.backend import uses_triton
from stillhouse.fused.config import FusedConfig
from stillhouse.fused.products import (
    ChunkLogits,
    DeviceProducts,
    GradAccumulator,
    ModelOutput,
    free_memory,
)
from stillhouse.objectives.base import Objective
from stillhouse.objectives.kernels import KernelTerm
from stillhouse.objectives.logits import differentiated, label_logprobs, without_excluded

BLOCK_ENTRIES_CPU = 2**19
"""Logits of one block on a CPU: so few that the temporaries of the arithmetic stay in its cache."""
BLOCK_ENTRIES = 2**26
"""Elsewhere blocks are large, so that starting kernels costs nothing."""
SLAB_ROWS_CPU, SLAB_ROWS = 128, 1024
"""Rows for which a teacher's logits are there at a time; the student's are kept until the chunk ends."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""For hidden states, head weight and head bias."""
Arithmetic = Callable[[Tensor, Rows], tuple[Tensor, Tensor]]
"""The student's logits and what the teachers say -> values, and the gradient of their sum."""


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
    token_values = torch.compile(objective.token_values, dynamic=False)
    return lambda student, rows: differentiated(student, lambda leaf: token_values(leaf, rows))


@dataclass(slots=True)
class RowBlock:
    """Rows of a call that share an objective: models, facts, weights, and how gradients reach them."""

    objective: Objective
    loss_weight: float
    """That of the objective within the one that holds it."""
    student: ModelOutput
    teachers: dict[str, ModelOutput]
    """Those that give hidden states, by name."""
    rows: Rows
    token_weight: Tensor
    label_slope: Tensor | None
    """[n]: the gradient for the log-probability of each label, from the part over whole sequences."""

    def at(self, index: RowIndex | slice) -> RowBlock:
        """Some of its rows, and the teachers' rows that belong to them."""
        if isinstance(index, slice):
            index = RowIndex(index)
        return RowBlock(
            self.objective,
            self.loss_weight,
            self.student.at(index),
            {name: one.at(self.rows.teacher_index(name, index)) for name, one in self.teachers.items()},
            self.rows[index],
            index.pick(self.token_weight),
            None if self.label_slope is None else index.pick(self.label_slope),
        )

    def aligned(self, multiple: int) -> RowBlock:
        """With heads filled up to a multiple of so many rows."""
        teachers = {name: one.aligned(multiple) for name, one in self.teachers.items()}
        return replace(self, student=self.student.aligned(multiple), teachers=teachers)

    def under(self, objective: Objective, loss_weight: float) -> RowBlock:
        """The same rows under one of the objectives that its own holds, with the teachers that it asks."""
        asked = objective.token_models if objective.has_token_part else frozenset()
        teachers = {name: one for name, one in self.teachers.items() if name in asked}
        return replace(self, objective=objective, loss_weight=loss_weight, teachers=teachers)


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Consecutive rows that share an objective."""

    objective: Objective
    loss_weight: float
    rows: slice

    def within(self, chunk: slice) -> RowSpan:
        """What of it lies in a chunk, counted from the chunk's start; maybe nothing."""
        start, stop = max(self.rows.start, chunk.start), min(self.rows.stop, chunk.stop)
        return replace(self, rows=slice(start - chunk.start, max(start, stop) - chunk.start))


class FusedHeadLoss:
    """One call. `run` returns the loss, the values of all rows, and the gradients that are wanted."""

    def __init__(
        self,
        block: RowBlock,
        config: FusedConfig,
        needs_grad: tuple[bool, bool, bool],
        exclude: bool,
        products: DeviceProducts | None = None,
    ) -> None:
        """Prepare a call.

        Args:
            block: all rows.
            config: memory budget and precision.
            needs_grad: whether hidden states, head weight and head bias of the student need a gradient.
            exclude: whether a head may take entries out by -inf.
            products: the matrix products of the device; None: those that are found there.
        """
        device = block.token_weight.device
        if device.type == "cpu":
            _let_the_heap_keep_what_is_freed()
        self.products = products or DeviceProducts.of(device)
        block = block.aligned(self.products.multiple)
        self.block = block
        self.config = config
        self.needs_grad = needs_grad
        self.exclude = exclude
        self.triton = uses_triton(config.backend, device)
        self.fp32 = self.products.fp32_results if config.fp32_logits is None else config.fp32_logits
        self.chunk_rows = config.chunk_size(
            block.token_weight.shape[0], self._bytes_per_row(), free_memory(device)
        )
        entries = BLOCK_ENTRIES_CPU if device.type == "cpu" else BLOCK_ENTRIES
        self.block_rows = max(1, entries // block.student.height)
        self.slab_rows = SLAB_ROWS_CPU if device.type == "cpu" else SLAB_ROWS

    def run(self) -> tuple[Tensor, Tensor, GradAccumulator]:
        """See the class."""
        values = self._sequence_values()
        spans, order = self._spans()
        ordered = self.block.at(order)
        active = spans[-1].rows.stop if spans else 0
        chunks = -(-active // self.chunk_rows)
        grads = GradAccumulator(self.block.student, self.needs_grad, chunks, self.products)
        for chunk in _cut(0, active, self.chunk_rows):
            where = order[chunk].on(values.device)
            inside = [span.within(chunk) for span in spans]
            values[where] += self._chunk(ordered.at(chunk), inside, grads, where)
        grads.finish()
        return (values * self.block.token_weight).sum(), values, grads

    def _spans(self) -> tuple[list[RowSpan], RowIndex]:
        """Which objective is for which rows once sorted by that, and the rows in that order."""
        block, spans, found, at = self.block, list[RowSpan](), list[Ints](), 0
        for weight, objective, index in block.objective.split(block.rows):
            if objective.has_token_part or block.label_slope is not None:
                found.append(np.arange(block.token_weight.shape[0]) if index is None else index)
                spans.append(RowSpan(objective, weight, slice(at, at + len(found[-1]))))
                at += len(found[-1])
        return spans, RowIndex.of(np.concatenate(found) if found else np.arange(0))

    def _chunk(
        self, chunk: RowBlock, spans: list[RowSpan], grads: GradAccumulator, where: Tensor | slice
    ) -> Tensor:
        """Values of the rows of one chunk; its gradients go into `grads`."""
        student, values = self._student_logits(chunk.student), list[Tensor]()
        for span in spans:
            part = chunk.under(span.objective, span.loss_weight)
            for slab in _cut(span.rows.start, span.rows.stop, self.slab_rows):
                values += self._slab(part, student, slab, grads)
        if student.filled is not None:
            grads.add(student.filled, chunk.student, where)
        return torch.cat(values)

    def _slab(
        self, part: RowBlock, student: ChunkLogits, slab: slice, grads: GradAccumulator
    ) -> list[Tensor]:
        """Values of so many rows of a chunk that the teachers' logits are held for at a time."""
        whole, values = part.at(slab), []
        products = {name: self._product(one) for name, one in whole.teachers.items()}
        terms = self._kernel_terms(whole)
        if terms is not None:
            out = None if student.gradient is None else student.gradient[slab]
            return [self._by_kernel(terms, whole, student.product[slab], products, out, grads)]
        for rows in _cut(slab.start, slab.stop, self.block_rows):
            inside = slice(rows.start - slab.start, rows.stop - slab.start)
            logits = {name: part.teachers[name].logits(raw[inside]) for name, raw in products.items()}
            out = None if student.gradient is None else student.gradient[rows]
            values.append(self._block(part.at(rows), student.product[rows], logits, out, grads))
        return values

    def _kernel_terms(self, block: RowBlock) -> tuple[KernelTerm, ...] | None:
        """What the Triton template computes for these rows; None: it does not."""
        if not self.triton or block.rows.alignment is not None:
            return None
        terms = block.objective.kernel_terms(block.rows)
        if terms is None or any(t.teacher_model not in {None, *block.teachers} for t in terms):
            return None  # what a teacher says about a few tokens has no row of logits
        return terms

    def _by_kernel(
        self,
        terms: tuple[KernelTerm, ...],
        block: RowBlock,
        product: Tensor,
        products: dict[str, Tensor],
        out: Tensor | None,
        grads: GradAccumulator,
    ) -> Tensor:
        """As `_block`, by the Triton template, from the bare products of all models."""
        from stillhouse.fused.triton.launch import HeadProduct, RowWeights, values_and_gradient

        values = values_and_gradient(
            terms,
            HeadProduct(product, block.student.head, block.student.bias),
            {
                name: HeadProduct(raw, block.teachers[name].head, block.teachers[name].bias)
                for name, raw in products.items()
            },
            RowWeights(block.token_weight, block.loss_weight, block.rows.labels, block.label_slope),
            out,
        )
        if out is not None and grads.bias is not None:
            grads.bias += out.sum(0, dtype=grads.bias.dtype)
        return values

    def _student_logits(self, student: ModelOutput) -> ChunkLogits:
        return ChunkLogits.of(student, self.products, self.fp32, any(self.needs_grad))

    def _product(self, output: ModelOutput) -> Tensor:
        return output.product(self.products, self.fp32)

    def _bytes_per_row(self) -> int:
        """Of the student's logits, and of their gradient where it is not written over them."""
        weight = self.block.student.weight
        operand = weight.dtype.itemsize
        logits = max(operand, 4) if self.fp32 else operand
        apart = operand if any(self.needs_grad) and logits != operand else 0
        return weight.shape[0] * (logits + apart)

    def _block(
        self,
        block: RowBlock,
        product: Tensor,
        logits: dict[str, Tensor],
        out: Tensor | None,
        grads: GradAccumulator,
    ) -> Tensor:
        """Values of a few rows; the gradient for their products is written to `out`."""
        objective = block.objective
        student = block.student.logits(product)
        if self.exclude:
            student, logits = without_excluded(student, logits, objective.requirements().same_tokenizer)
        rows = block.rows.with_signals(logits)
        if out is None:
            if not objective.has_token_part:
                return student.new_zeros(student.shape[0])
            return block.loss_weight * objective.token_values(student, rows)
        slope = block.student.head.slope(student)
        values, gradient = self._values_and_gradient(block, student, rows)
        if slope is not None:
            gradient.mul_(slope)
        if grads.bias is not None:
            grads.bias += gradient.sum(0)
        out.copy_(gradient)
        return values

    def _values_and_gradient(self, block: RowBlock, student: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Values [n], and the gradient of the loss for the logits [n, V], which are scratch."""
        objective, through = block.objective, None
        if block.label_slope is not None:
            through = label_gradient(student, rows, block.label_slope)
        if not objective.has_token_part:
            assert through is not None
            return student.new_zeros(student.shape[0]), through
        if objective.mixes_rows and rows.alignment is not None:
            values, gradient = _weighted_gradient(block, student, rows)
        else:
            arithmetic: Arithmetic = objective.token_values_and_gradient
            if self.config.backend == "compile":
                arithmetic = _compiled(objective)
            values, gradient = arithmetic(student, rows)
            values = block.loss_weight * values
            gradient.mul_((block.loss_weight * block.token_weight)[:, None])
        return values, gradient if through is None else gradient.add_(through)

    def label_facts(self) -> Rows:
        """The rows with the label log-probabilities of all models, and the gaps that follow from them.

        What the rows bring along is not computed again.
        """
        rows = self.block.rows
        if rows.labels is None:
            raise ValueError("log-probabilities of labels need labels")
        ours, teachers = rows.student_logprobs, dict(rows.teachers)
        if ours is None:
            ours = self._label_logprobs(self.block.student)
        for name, output in self.block.teachers.items():
            facts = teachers.get(name, TeacherRows())
            if facts.label_logprobs is None and rows.shares_labels(name):
                teachers[name] = replace(facts, label_logprobs=self._label_logprobs(output))
        known = with_gaps(replace(rows, student_logprobs=ours, teachers=teachers))
        return self.block.objective.with_sequence_facts(known)

    def _sequence_values(self) -> Tensor:
        """Values [N] that depend on whole sequences, for which label log-probabilities are filled in; their
        gradient for labels goes into `block`."""
        block = self.block
        values = torch.zeros_like(block.token_weight)
        if not block.objective.sequence_level or not len(values):  # a process may have no row with weight
            return values
        block.rows = self.label_facts()
        if not block.objective.has_sequence_part:
            return values
        with torch.enable_grad():
            leaf = block.rows.student_logprobs.detach().requires_grad_()  # type: ignore[union-attr]
            found = block.objective.per_sequence(replace(block.rows, student_logprobs=leaf))
            if any(self.needs_grad) and found.requires_grad:
                (block.label_slope,) = torch.autograd.grad((found * block.token_weight).sum(), leaf)
        return values + found.detach()

    def _label_logprobs(self, output: ModelOutput) -> Tensor:
        labels = self.block.rows.labels
        assert labels is not None
        found = []
        for chunk in _cut(0, labels.shape[0], self.chunk_rows):
            product = self._product(output.at(RowIndex(chunk)))
            if self.triton:
                from stillhouse.fused.triton.launch import HeadProduct, label_logprobs_of

                found.append(label_logprobs_of(HeadProduct(product, output.head, output.bias), labels[chunk]))
                continue
            for rows in _cut(0, product.shape[0], self.block_rows):
                found.append(label_logprobs(output.logits(product[rows]), labels[chunk][rows]))
        return torch.cat(found)


def _cut(start: int, stop: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover start to stop."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def _weighted_gradient(block: RowBlock, student: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of their weighted sum, where a row's logits count in the values of others."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        values = block.loss_weight * block.objective.token_values(leaf, rows)
        loss = (values * block.token_weight).sum()
        gradient = torch.zeros_like(leaf)  # of a response that nothing is aligned with
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, leaf)
    return values.detach(), gradient


def label_gradient(student: Tensor, rows: Rows, coefficient: Tensor) -> Tensor:
    """coefficient times the gradient of the label's log-probability for the logits: [i = label] - q_i."""
    assert rows.labels is not None
    gradient = torch.softmax(student, -1).mul_(-coefficient[:, None])
    return gradient.scatter_add_(1, rows.labels[:, None], coefficient[:, None])
