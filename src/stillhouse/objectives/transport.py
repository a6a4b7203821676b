"""Optimal transport between the tokens of one response under two tokenizers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.curriculum import NonNegative
from stillhouse.objectives.alignment import NOTHING, Alignment, Matching
from stillhouse.objectives.base import Objective, register
from stillhouse.objectives.rows import Rows
from stillhouse.objectives.sinkhorn import divergence


class _Transport(Objective):
    """The Sinkhorn divergence between the student's and the teacher's rows of each response."""

    same_vocabulary: ClassVar[bool] = False
    whole: ClassVar[Literal["row", "group", "sequence"]] = "sequence"
    mixes_rows: ClassVar[bool] = True
    blur: Annotated[float, Field(gt=0.0)] = 0.1
    """The entropy that smooths the transport, in units of the cost: two distributions are at most 1 apart."""
    place_weight: NonNegative = 10.0
    """Cost of moving text: times the squared distance of two rows in their response, measured in bytes, whole
    response = 1."""

    @property
    def sequence_level(self) -> bool:
        """False: whole sequences are needed, but no label's log-probability."""
        return False

    def over_sequences(self, ours: Tensor, theirs: Tensor, alignment: Alignment) -> Tensor:
        """The divergence of each sequence at each of its rows, [N]; zero where nothing is aligned."""
        value = ours.new_zeros(ours.shape[0])
        for student, teacher in _sequences(alignment):
            places = alignment.student_places[student], alignment.teacher_places[teacher]
            points = self.points(ours[student], theirs[teacher], alignment, student, teacher)
            found = divergence(*self._costs(points, places), self.blur)
            whole = alignment.student_sequences == alignment.student_sequences[student[0]]
            value = torch.where(whole, found, value)
        return value

    @abstractmethod
    def points(
        self, ours: Tensor, theirs: Tensor, alignment: Alignment, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Points of the same space for n rows of the student and m of the teacher, with squared norms of at
        most 1/2."""

    def _costs(
        self, points: tuple[Tensor, Tensor], places: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, y = points
        a, b = (place.to(x.dtype) for place in places)

        def cost(one: Tensor, other: Tensor, here: Tensor, there: Tensor) -> Tensor:
            squares = one.square().sum(-1)[:, None] + other.square().sum(-1)[None] - 2 * one @ other.t()
            return squares.clamp_min(0) + float(self.place_weight) * (here[:, None] - there[None]).square()

        return cost(x, y, a, b), cost(x, x, a, a), cost(y, y, b, b)


@register
class Transport(_Transport):
    """Optimal transport between the predicted distributions of a response: which rows belong together is
    found.

    Equation: S(Q, P) for each response, Q and P the rows' distributions over the tokens that both
        vocabularies spell alike and one entry for the rest, S the Sinkhorn divergence (transport cost with
        entropy, debiased) for the cost 1 - sum_v sqrt(q_v p_v) + w (place distance)^2: squared Hellinger
        distance and `place_weight` w. Every row of a response has the response's value.
    Gradient: the transport plans weigh the gradients of the costs.
    Character: neither; bounded. Blind to what the rest of the vocabularies holds.
    When: tokenizers that cut text so differently that few positions fall together; beside `span` or
        cross-entropy.
    Source: the idea is that of CoT2Align (arXiv 2502.16806), transport over whole sequences; cost, entropy
        and debiasing are ours (Feydy et al. 2019, arXiv 1810.08278, for the divergence).
    """

    kind: Literal["transport"] = "transport"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher", "sequences"})

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        assert teacher is not None
        return self.over_sequences(student, teacher, _aligned(rows))

    def points(
        self, ours: Tensor, theirs: Tensor, alignment: Alignment, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        matching = alignment.matching
        if matching is None:
            size = min(ours.shape[-1], theirs.shape[-1])
            return _root(ours[:, :size], None), _root(theirs[:, :size], None)
        matching = matching.to(ours.device)
        return _root(ours, matching, 0), _root(theirs, matching, 1)


def _root(logits: Tensor, matching: Matching | None, side: int = 0) -> Tensor:
    """sqrt(probability / 2) over the shared tokens and the rest, [n, K + 1]: half the squared distance of two
    is 1 - sum sqrt(q p)."""
    logs = logits.log_softmax(-1)
    if matching is not None:
        rest = matching.rest[side]
        shared = logs[:, (matching.student, matching.teacher)[side]]
        tail = logs[:, rest].logsumexp(-1, keepdim=True) if rest.numel() else None
        # Both sides have an entry for the rest, or the spaces would differ.
        logs = torch.cat([shared, torch.full_like(logs[:, :1], -1e30) if tail is None else tail], -1)
    return (0.5 * logs).exp() * 0.5**0.5


def _aligned(rows: Rows) -> Alignment:
    if rows.alignment is not None:
        return rows.alignment
    assert rows.sequence_ids is not None
    return Alignment.identity(torch.zeros_like(rows.sequence_ids), rows.sequence_ids)


def _sequences(alignment: Alignment) -> Iterator[tuple[Tensor, Tensor]]:
    """The aligned rows of the student and of the teacher, sequence by sequence."""
    ours = alignment.student_groups != NOTHING
    theirs = alignment.teacher_groups != NOTHING
    for sequence in alignment.student_sequences[ours].unique():
        student = (ours & (alignment.student_sequences == sequence)).nonzero().squeeze(-1)
        yield student, (theirs & (alignment.teacher_sequences == sequence)).nonzero().squeeze(-1)
