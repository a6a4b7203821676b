"""Transport against its equation: plain Sinkhorn over probabilities, value and gradient, per response."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.objectives.problems import logits
from torch import Tensor

from stillhouse.core.alignment import TokenAlignment, VocabularyMatch
from stillhouse.core.head import ModelHead, ModelSignal
from stillhouse.core.rows import Rows
from stillhouse.fused import FusedConfig, fused_rows
from stillhouse.objectives import build

OURS, THEIRS = 6, 8
MATCHING = VocabularyMatch(torch.tensor([0, 2, 5]), torch.tensor([7, 1, 4]), (OURS, THEIRS))
ALIGNMENT = TokenAlignment(
    student_groups=torch.tensor([0, 1, 1, 2, -1, 3, -1]),
    teacher_groups=torch.tensor([0, 0, 1, -1, 2, 2, 3, 3, 3]),
    teacher_labels=torch.zeros(9, dtype=torch.int64),
    student_sequences=torch.tensor([0, 0, 0, 0, 0, 1, 2]),
    teacher_sequences=torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]),
    student_places=torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 0.0, 0.0], dtype=torch.float64),
    teacher_places=torch.tensor([0.0, 0.1, 0.2, 0.6, 0.7, 0.8, 0.0, 0.3, 0.6], dtype=torch.float64),
    matching=MATCHING,
)
"""A long response, one of a single token of the student, and one without a counterpart."""
ALIGNED = {0: ([0, 1, 2, 3], [0, 1, 2, 4, 5]), 1: ([5], [6, 7, 8])}
ROWS = Rows(labels=torch.zeros(7).long(), sequence_ids=ALIGNMENT.student_sequences, alignment=ALIGNMENT)


def entropic_cost(cost: Tensor, blur: float) -> Tensor:
    """min <P, C> + e KL(P || 1/nm): rows and columns of exp(-C / e) are scaled in turn; the gradient is P."""
    n, m = cost.shape
    kernel, columns = (-cost.detach() / blur).exp(), torch.ones(m, dtype=cost.dtype) / m
    for _ in range(4000):
        rows = (1 / n) / (kernel @ columns)
        columns = (1 / m) / (kernel.t() @ rows)
    plan = rows[:, None] * kernel * columns[None]
    return (plan * cost).sum() + blur * (plan * (plan * n * m).log()).sum()


def divergence(costs: tuple[Tensor, Tensor, Tensor], blur: float) -> Tensor:
    between, ours, theirs = (entropic_cost(cost, blur) for cost in costs)
    return between - ours / 2 - theirs / 2


def costs_of(
    distance: list[list[Tensor]], places: list[Tensor], weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of both sets, of the first with itself, of the second with itself."""
    found = []
    for first, second in ((0, 1), (0, 0), (1, 1)):
        moved = (places[first][:, None] - places[second][None]) ** 2
        found.append(distance[first][second] + weight * moved)
    return found[0], found[1], found[2]


def hellinger(q: Tensor, p: Tensor) -> Tensor:
    """1 - sum sqrt(q p) of every row with every other."""
    return torch.stack([torch.stack([1 - (one * other).sqrt().sum() for other in p]) for one in q])


def places_of(sequence: int) -> list[Tensor]:
    ours, theirs = ALIGNED[sequence]
    return [
        torch.from_numpy(ALIGNMENT.student_places[ours]),
        torch.from_numpy(ALIGNMENT.teacher_places[theirs]),
    ]


def by_hand(student: Tensor, teacher: Tensor, blur: float, weight: float) -> Tensor:
    ids = MATCHING.on(torch.device("cpu"))
    values = student.new_zeros(7)
    for sequence, (ours, theirs) in ALIGNED.items():
        sets = []
        for table, rows, shared in ((student, ours, ids.student), (teacher, theirs, ids.teacher)):
            chances = table[rows].softmax(-1)[:, shared]
            sets.append(torch.cat([chances, 1 - chances.sum(1, keepdim=True)], 1))
        distance = [[hellinger(one, other) for other in sets] for one in sets]
        found = divergence(costs_of(distance, places_of(sequence), weight), blur)
        values = values + found * torch.from_numpy(ALIGNMENT.student_sequences == sequence)
    return values


def profile(states: Tensor, starts: list[int]) -> Tensor:
    """Cosines of centred states with those of the group starts."""
    centred = states - states[starts].mean(0)
    unit = centred / centred.norm(dim=1, keepdim=True)
    return unit @ unit[starts].t()


def by_hand_of_layers(student: Tensor, teacher: Tensor, blur: float, weight: float) -> Tensor:
    """Of the long response: mean squared differences of profiles over 4."""
    ours, theirs = ALIGNED[0]
    sets = [profile(student[ours], [0, 1, 3]), profile(teacher[theirs], [0, 2, 3])]
    distance = [[((one[:, None] - other[None]) ** 2).mean(-1) / 4 for other in sets] for one in sets]
    return divergence(costs_of(distance, places_of(0), weight), blur)


@pytest.mark.parametrize(("blur", "weight"), [(0.1, 10.0), (0.3, 0.0), (0.05, 1.0)])
def test_value_and_gradient_are_those_of_plain_sinkhorn(blur: float, weight: float) -> None:
    student, teacher = logits(7, OURS, 1).requires_grad_(), logits(9, THEIRS, 2)
    wanted = by_hand(student, teacher, blur, weight)
    objective = build("transport", blur=blur, place_weight=weight)
    found = objective(student, teacher, ROWS)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    slopes = [
        torch.autograd.grad(one[[0, 5]].sum(), student, retain_graph=True)[0] for one in (found, wanted)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)
    assert found[6] == 0
    assert found[0] != found[5]


def test_over_the_head_in_chunks_it_is_the_same() -> None:
    hidden, weight = logits(7, 4, 3).requires_grad_(), logits(OURS, 4, 4).requires_grad_()
    theirs, head = logits(9, 3, 5), logits(THEIRS, 3, 6)
    token_weight = torch.tensor([0.1, 0.0, 0.3, 0.2, 0.1, 0.5, 0.7], dtype=torch.float64)
    wanted = by_hand(hidden @ weight.t(), theirs @ head.t(), 0.1, 10.0)
    loss, values = fused_rows(
        build("transport"), hidden, weight, {"main": ModelSignal(theirs, ModelHead(head))},
        token_weight=token_weight, rows=ROWS, config=FusedConfig(chunk_rows=2),
    )  # fmt: skip
    torch.testing.assert_close(values, (wanted * (token_weight > 0)).detach(), rtol=1e-6, atol=1e-8)
    slopes = [torch.autograd.grad(one, (hidden, weight)) for one in (loss, (wanted * token_weight).sum())]
    for got, one in zip(*slopes, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-7)


def test_layers_are_compared_by_their_profiles() -> None:
    ours, theirs = logits(7, 5, 7).requires_grad_(), logits(9, 12, 8)
    objective = build("transport", layers=[0.5], layer_weight=0.7, place_weight=2.0)
    found = objective.per_layers({0.5: ours}, {0.5: theirs}, replace(ROWS, labels=None))[0]
    wanted = 0.7 * by_hand_of_layers(ours, theirs, 0.1, 2.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    slopes = [torch.autograd.grad(one, ours, retain_graph=True)[0] for one in (found, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5)
