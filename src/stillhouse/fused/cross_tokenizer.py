"""The fused path where rows of the two models do not fall together: chunks of whole groups or sequences."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

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
        everything = torch.arange(count, device=part.weights.device)
        for share, objective, index in part.objective.split(part.rows):
            piece = replace(part, objective=objective, share=share)
            for chunk in self._pieces(objective, everything if index is None else index, self.chunk_rows):
                values[chunk] += self._aligned_chunk(piece, chunk, sums).to(values.dtype)
        sums.finish()
        values = values * (part.weights != 0)
        return (values * part.weights).sum(), values, sums

    def _pieces(self, objective: Objective, index: Tensor, size: int) -> list[Tensor]:
        """Rows in runs of whole units of about `size` rows; units without any weight are left out."""
        alignment = self.part.rows.alignment
        assert alignment is not None
        units = alignment.units(objective.granularity)[index]
        _, run = torch.unique_consecutive(units, return_inverse=True)
        weighty = torch.zeros(int(run[-1]) + 1 if len(run) else 0, dtype=torch.bool, device=run.device)
        weighty[run[self.part.weights[index] != 0]] = True
        kept = weighty[run]
        index, run = index[kept], run[kept]
        _, lengths = torch.unique_consecutive(run, return_counts=True)
        cuts, held = [0], 0
        for length in lengths.tolist():
            if held and held + length > size:
                cuts.append(cuts[-1] + held)
                held = 0
            held += length
        return [piece for piece in index.tensor_split(cuts[1:]) if len(piece)]

    def _aligned_chunk(self, piece: RowBlock, chunk: Tensor, sums: GradAccumulator) -> Tensor:
        """Values of the rows of one chunk; its gradients go into `sums`."""
        student = piece.student.at(chunk)
        product = student.product(self.chunking.fp32_logits)
        gradient = None
        if any(self.needs):
            operand = student.weight.dtype
            gradient = product if product.dtype == operand else torch.empty_like(product, dtype=operand)
        entries = BLOCK_ENTRIES_CPU if product.device.type == "cpu" else BLOCK_ENTRIES
        at, values = 0, []
        for rows in self._pieces_within(piece, chunk, max(1, entries // product.shape[1])):
            block = slice(at, at + len(rows))
            out = None if gradient is None else gradient[block]
            values.append(self._aligned_block(piece, rows, product[block], out, sums))
            at += len(rows)
        if gradient is not None:
            sums.add(gradient, student, chunk)
        return torch.cat(values)

    def _pieces_within(self, piece: RowBlock, chunk: Tensor, size: int) -> list[Tensor]:
        found = self._pieces(piece.objective, chunk, size)
        assert sum(map(len, found)) == len(chunk), "units without weight are left out before"
        return found

    def _aligned_block(
        self, piece: RowBlock, rows: Tensor, product: Tensor, out: Tensor | None, sums: GradAccumulator
    ) -> Tensor:
        """Values of a few whole units; the gradient for their products is written to `out`."""
        others: dict[str, Tensor] = {}
        if piece.objective.needs_teacher:
            alignment = piece.rows.alignment
            assert alignment is not None
            teacher = piece.others["teacher"].at(alignment.teacher_rows(rows))
            others["teacher"] = teacher.logits(teacher.product(self.chunking.fp32_logits))
        small = replace(
            piece,
            student=piece.student.at(rows),
            others={},
            rows=piece.rows[rows],
            weights=piece.weights[rows],
            through_label=None if piece.through_label is None else piece.through_label[rows],
        )
        if out is None or not piece.objective.mixes_rows:
            return self._block(small, product, others, out, sums)
        student = small.student.logits(product)
        teacher_logits = others.get("teacher")
        if self.exclude:
            student, teacher_logits = aligned(student, (teacher_logits,), piece.objective.shares_vocabulary)
        slope = small.student.head.slope(student)
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            value = small.share * small.objective.per_token(leaf, teacher_logits, small.rows)
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
