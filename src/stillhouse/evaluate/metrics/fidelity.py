"""How near the student's next-token distribution is to the teacher's, position by position."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from stillhouse.errors import DataError


@dataclass(frozen=True, slots=True)
class FidelityScores:
    """Means over all positions that were seen; p is the teacher's distribution, q the student's.

    Example: `FidelityScores(tokens=4210, kl_to_teacher=0.21, reverse_kl_to_teacher=0.19, tvd=0.14,
    top1_agreement=0.88)`
    """

    tokens: int
    """Number of positions."""
    kl_to_teacher: float
    """Forward KL(p || q) = sum_v p log(p / q), in nats per token; 0 where the student equals the teacher."""
    reverse_kl_to_teacher: float
    """Reverse KL(q || p) = sum_v q log(q / p), in nats per token."""
    tvd: float
    """Total variation distance 1/2 sum_v |p - q|, 0 to 1; a speculative decoder accepts 1 - TVD."""
    top1_agreement: float
    """Share (0 to 1) of positions where both give the same token the highest probability."""

    def as_metrics(self) -> dict[str, float]:
        """The numbers by name, without the count."""
        return {name: value for name, value in asdict(self).items() if name != "tokens"}


class Fidelity:
    """Accumulates fidelity over batches of any size, in sums of float64.

    The result depends on the rows only, not on how they were split into batches.

    Example:
        >>> fidelity = Fidelity()
        >>> for batch in batches:
        ...     fidelity.update(student_logits, teacher_logits)   # both [N, V], response positions only
        >>> fidelity.scores().kl_to_teacher
    """

    def __init__(self, chunk: int = 512) -> None:
        """Work on `chunk` rows at a time, which bounds the memory to a few [chunk, V] float32 arrays."""
        self.chunk = chunk
        self.tokens = 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    @torch.no_grad()
    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Add positions.

        Args:
            student_logits: [N, V], any floating type; -inf where a token is excluded.
            teacher_logits: [N, V], the same positions and the same vocabulary.

        Raises:
            ValueError: the shapes differ.
            DataError: a logit is NaN, which would spoil every mean.
        """
        if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
            raise ValueError(
                "fidelity: needs student and teacher logits of one shape [N, V]; "
                f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
            )
        sums = torch.zeros(4, dtype=torch.float64, device=student_logits.device)
        rows = zip(student_logits.split(self.chunk), teacher_logits.split(self.chunk), strict=True)
        for student, teacher in rows:
            sums += _row_values(student.float(), teacher.float()).sum(dim=1, dtype=torch.float64)
        added = sums.cpu()
        if added.isnan().any():
            raise DataError(
                "fidelity: a logit of student or teacher is NaN. Check the weights, or load them in float32."
            )
        self._sums += added
        self.tokens += student_logits.shape[0]

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
    """[4, N]: forward KL, reverse KL, TVD, top-1 agreement. One log-softmax a model serves all four."""
    log_q, log_p = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    q, p = log_q.exp(), log_p.exp()
    gap = log_p - log_q
    nothing = torch.zeros((), device=gap.device)
    # A token that one side excludes (probability 0) adds 0 to that side's divergence, not 0 * inf = NaN.
    forward = torch.where(log_p == -torch.inf, nothing, p * gap).sum(dim=-1)
    reverse = torch.where(log_q == -torch.inf, nothing, -q * gap).sum(dim=-1)
    distance = 0.5 * (p - q).abs().sum(dim=-1)
    agreement = (student.argmax(dim=-1) == teacher.argmax(dim=-1)).float()
    return torch.stack([forward, reverse, distance, agreement])
