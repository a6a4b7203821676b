"""Metrics of next-token distributions: fidelity to the teacher and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from stillhouse.errors import DataError


@dataclass(frozen=True, slots=True)
class FidelityScores:
    """Means over positions; p is the teacher's distribution, q the student's.

    Example: `FidelityScores(tokens=4210, kl_to_teacher=0.21, reverse_kl_to_teacher=0.19, tvd=0.14,
    top1_agreement=0.88)`
    """

    tokens: int
    """Number of positions."""
    kl_to_teacher: float
    """Forward KL(p || q) = sum_v p log(p / q), in nats per token."""
    reverse_kl_to_teacher: float
    """Reverse KL(q || p) = sum_v q log(q / p), in nats per token."""
    tvd: float
    """Total variation distance 1/2 sum_v |p - q|, 0 to 1; the acceptance rate of speculative decoding is
    1 - TVD."""
    top1_agreement: float
    """Share (0 to 1) of positions where both rank the same token first."""

    def as_metrics(self) -> dict[str, float]:
        """The means by name, without the count."""
        return {name: value for name, value in asdict(self).items() if name != "tokens"}


class Fidelity:
    """Accumulates fidelity over batches, in float64 sums: the result does not depend on the batch size.

    Example:
        >>> fidelity = Fidelity()
        >>> for batch in batches:
        ...     fidelity.update(student_logits, teacher_logits)   # both [N, V], response positions only
        >>> fidelity.scores().kl_to_teacher
    """

    def __init__(self, chunk: int = 512) -> None:
        """Process `chunk` positions at a time, which bounds memory to a few [chunk, V] float32 tensors."""
        self.chunk = chunk
        self.tokens = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    @torch.no_grad()
    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Add positions.

        Args:
            student_logits: [N, V], any floating dtype; -inf for excluded tokens.
            teacher_logits: [N, V], the same positions and vocabulary.

        Returns:
            [4, N] the values of each position: forward KL, reverse KL, TVD, top-1 agreement.

        Raises:
            ValueError: the shapes differ.
            DataError: a logit is NaN, which would spoil every mean.
        """
        if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
            raise ValueError(
                "fidelity: student and teacher logits must have one shape [N, V]; "
                f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
            )
        rows = zip(student_logits.split(self.chunk), teacher_logits.split(self.chunk), strict=True)
        values = [_row_values(student.float(), teacher.float()) for student, teacher in rows]
        sums = torch.zeros(4, dtype=torch.float64, device=student_logits.device)
        for part in values:
            sums += part.sum(dim=1, dtype=torch.float64)
        added = sums.cpu()
        if added.isnan().any():
            raise DataError(
                "fidelity: a logit of student or teacher is NaN. Check the weights, or load them in float32."
            )
        self._sums += added
        self.tokens += student_logits.shape[0]
        return torch.cat(values, dim=1) if values else sums[:, None][:, :0]

    def add(self, others: Sequence[Fidelity]) -> None:
        """Add the positions of others."""
        for other in others:
            self._sums += other._sums
            self.tokens += other.tokens

    def scores(self) -> FidelityScores:
        """The means so far.

        Raises:
            DataError: no position was added.
        """
        if self.tokens == 0:
            raise DataError("fidelity: there are no response positions to compare.")
        forward, reverse, distance, agreement = (self._sums / self.tokens).tolist()
        return FidelityScores(self.tokens, forward, reverse, distance, agreement)


def _row_values(student: Tensor, teacher: Tensor) -> Tensor:
    """[4, N]: forward KL, reverse KL, TVD, top-1 agreement, from one log-softmax per model."""
    log_q, log_p = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    q, p = log_q.exp(), log_p.exp()
    log_ratio = log_p - log_q
    zero = torch.zeros((), device=log_ratio.device)
    # A token of probability 0 adds 0 to the expectation, not 0 * inf = NaN.
    forward = torch.where(log_p == -torch.inf, zero, p * log_ratio).sum(dim=-1)
    reverse = torch.where(log_q == -torch.inf, zero, -q * log_ratio).sum(dim=-1)
    distance = 0.5 * (p - q).abs().sum(dim=-1)
    agreement = (student.argmax(dim=-1) == teacher.argmax(dim=-1)).float()
    return torch.stack([forward, reverse, distance, agreement])


class Calibration:
    """Accumulates the expected calibration error (ECE) of next-token predictions over batches.

    The confidence at a position is the highest probability; the prediction is correct if that token is the
    label. With bins of equal width over the confidence, n_b positions in bin b, their mean confidence c_b and
    accuracy a_b,

        ECE = sum_b n_b / n |a_b - c_b|,

    0 to 1; 0 for a model that is correct at 80 % of the positions where its confidence is 80 %.

    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", equation 5, with its 15 bins.

    Example:
        >>> calibration = Calibration()
        >>> calibration.update(logits, labels)  # [N, V], [N]
        >>> calibration.error()
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self._sums = torch.zeros(3, bins, dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add positions.

        Args:
            logits: [N, V], any floating dtype.
            labels: [N] token ids.
        """
        confidence, token = logits.float().softmax(-1).max(-1)
        confidence = confidence.double()
        index = (confidence * self.bins).ceil().long().sub(1).clamp(0, self.bins - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, (token == labels).double()])
        sums = torch.zeros(3, self.bins, dtype=torch.float64, device=values.device)
        self._sums += sums.index_add_(1, index, values).cpu()

    def add(self, others: Sequence[Calibration]) -> None:
        """Add the positions of others."""
        for other in others:
            self._sums += other._sums

    def error(self) -> float:
        """The expected calibration error so far.

        Raises:
            DataError: no position was added.
        """
        count, confidence, correct = self._sums
        if count.sum() == 0:
            raise DataError("calibration: there are no response positions.")
        return float((correct - confidence).abs().sum() / count.sum())
