"""The fused path where rows of the two models do not fall together: chunks of whole groups or sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.host import Ints, RowIndex
from stillhouse.core.requirements import MAIN
from stillhouse.fused.kernel import (
    BLOCK_ENTRIES,
    BLOCK_ENTRIES_CPU,
    FusedHeadLoss,
    GradAccumulator,
    RowBlock,
    label_gradient,
)
from stillhouse.objectives.base import Objective, aligned


class CrossTokenizerHeadLoss(FusedHeadLoss):
    """One call over N rows of the student and M of the teacher, which `rows.alignment` brings together.

    Cuts the student's rows where no group (or sequence, as the objective needs) is parted, and takes the
    teacher's rows that belong to a piece with it. As in `FusedHeadLoss` the logits of one chunk are held at
    a time, unless a single unit is larger.
    """

    def run(self) -> tuple[Tensor, Tensor, GradAccumulator]:
        """The loss, the values of all rows, and the gradients that are wanted."""
        part = self.part
        count = part.weights.shape[0]
        values = torch.zeros(count, dtype=self.exact, device=part.weights.device)
        if part.objective.sequence_level:  # only with one tokenizer: row n of both models is the same label
            values += self._over_sequences()
        sums = GradAccumulator(part.student, self.needs, self.exact, chunks=2)
        for share, objective, index in part.objective.split(part.rows):
            piece = replace(part, objective=objective, share=share)
            rows = np.arange(count) if index is None else index
            for chunk in self._pieces(objective, rows, self.chunk_rows):
                where = RowIndex.of(chunk, values.device)
                values[where.device] += self._aligned_chunk(piece, chunk, where, sums).to(values.dtype)
        sums.finish()
        values = values * (part.weights != 0)
        return (values * part.weights).sum(), values, sums

    def _pieces(self, objective: Objective, rows: Ints, size: int) -> list[Ints]:
        """Rows in runs of whole units of about `size` rows; units without any weight are left out."""
        alignment, mask = self.part.rows.alignment, self.part.rows.loss_mask
        assert alignment is not None
        if not len(rows):
            return []
        units = alignment.units(objective.granularity)[rows]
        begins = np.flatnonzero(np.diff(units, prepend=units[0] - 1))
        lengths = np.diff(begins, append=len(rows))
        if mask is not None:
            kept = np.logical_or.reduceat(mask[rows], begins)
            rows, lengths = rows[np.repeat(kept, lengths)], lengths[kept]
        cuts, held = [0], 0
        for length in lengths.tolist():
            if held and held + length > size:
                cuts.append(cuts[-1] + held)
                held = 0
            held += length
        return [piece for piece in np.split(rows, cuts[1:]) if len(piece)]

    def _aligned_chunk(self, piece: RowBlock, chunk: Ints, where: RowIndex, sums: GradAccumulator) -> Tensor:
        """Values of the rows of one chunk; its gradients go into `sums`."""
        student = piece.student.at(where)
        product = student.product(self.config.fp32_logits)
        gradient = None
        if any(self.needs):
            operand = student.weight.dtype
            gradient = product if product.dtype == operand else torch.empty_like(product, dtype=operand)
        entries = BLOCK_ENTRIES_CPU if product.device.type == "cpu" else BLOCK_ENTRIES
        at, values = 0, []
        for rows in self._pieces(piece.objective, chunk, max(1, entries // product.shape[1])):
            block = slice(at, at + len(rows))
            out = None if gradient is None else gradient[block]
            index = RowIndex.of(rows, product.device)
            values.append(self._aligned_block(piece, index, product[block], out, sums))
            at += len(rows)
        assert at == len(chunk), "units without weight are left out before"
        if gradient is not None:
            sums.add(gradient, student, where.device)
        return torch.cat(values)

    def _aligned_block(
        self, piece: RowBlock, index: RowIndex, product: Tensor, out: Tensor | None, sums: GradAccumulator
    ) -> Tensor:
        """Values of a few whole units; the gradient for their products is written to `out`."""
        others: dict[str, Tensor] = {}
        for name in sorted(piece.objective.requirements().model_names & piece.others.keys()):
            theirs = piece.rows.teacher_index(index, product.device) if name == MAIN else index
            teacher = piece.others[name].at(theirs)
            others[name] = teacher.logits(teacher.product(self.config.fp32_logits))
        small = replace(piece, others={}).at(index)
        if out is None or not piece.objective.mixes_rows:
            return self._block(small, product, others, out, sums)
        student = small.student.logits(product)
        teacher_logits = others.get(MAIN)
        if self.exclude:
            student, teacher_logits = aligned(student, (teacher_logits,), piece.objective.shares_vocabulary)
        slope = small.student.head.slope(student)
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            rows = replace(small.rows, model_logits={n: one for n, one in others.items() if n != MAIN})
            value = small.share * small.objective.token_values(leaf, teacher_logits, rows)
            loss = (value * small.weights).sum()
            gradient = torch.zeros_like(leaf)  # of a response that nothing is aligned with
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss, leaf)
        if small.through_label is not None:
            gradient = gradient + label_gradient(student, small.rows, small.through_label)
        if slope is not None:
            gradient.mul_(slope)
        if sums.bias is not None:
            sums.bias += gradient.sum(0)
        out.copy_(gradient)
        return value.detach()
