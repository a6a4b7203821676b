"""The fused path where rows of the two models do not fall together: chunks of whole groups or sequences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.host import Ints, RowIndex
from stillhouse.fused.kernel import FusedHeadLoss, RowBlock
from stillhouse.fused.products import GradAccumulator
from stillhouse.objectives.base import Objective


class CrossTokenizerHeadLoss(FusedHeadLoss):
    """One call over N rows of the student and M of the teacher, which `rows.alignment` brings together.

    Cuts the student's rows where no group (or sequence, as the objective needs) is parted, and takes the
    teacher's rows that belong to a piece with it. As in `FusedHeadLoss` the logits of one chunk are held at
    a time, unless a single unit is larger.
    """

    def run(self) -> tuple[Tensor, Tensor, GradAccumulator]:
        """The loss, the values of all rows, and the gradients that are wanted."""
        values = self._sequence_values()  # only with one tokenizer: row n of both models is the same label
        block, count = self.block, values.shape[0]
        grads = GradAccumulator(block.student, self.needs_grad, 2, self.products)
        for weight, objective, index in block.objective.split(block.rows):
            part = block.under(objective, weight)
            rows = np.arange(count) if index is None else index
            for chunk in self._pieces(objective, rows, self.chunk_rows):
                where = RowIndex.of(chunk)
                found = self._aligned_chunk(part, chunk, where, grads)
                values[where.on(values.device)] += found.to(values.dtype)
        grads.finish()
        values = values * (block.token_weight != 0)
        return (values * block.token_weight).sum(), values, grads

    def _pieces(self, objective: Objective, rows: Ints, size: int) -> list[Ints]:
        """Rows in runs of whole units of about `size` rows; units without any weight are left out."""
        alignment, mask = self.block.rows.alignment, self.block.rows.loss_mask
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

    def _aligned_chunk(self, part: RowBlock, chunk: Ints, where: RowIndex, grads: GradAccumulator) -> Tensor:
        """Values of the rows of one chunk; its gradients go into `grads`."""
        student = part.student.at(where)
        logits = self._student_logits(student)
        at, values = 0, []
        for rows in self._pieces(part.objective, chunk, self.block_rows):
            block, inside = part.at(RowIndex.of(rows)), slice(at, at + len(rows))
            theirs = {name: one.logits(self._product(one)) for name, one in block.teachers.items()}
            out = None if logits.gradient is None else logits.gradient[inside]
            values.append(self._block(block, logits.product[inside], theirs, out, grads))
            at += len(rows)
        assert at == len(chunk), "units without weight are left out before"
        if logits.filled is not None:
            grads.add(logits.filled, student, where.on(logits.filled.device))
        return torch.cat(values)
