"""Options that follow a paper's code where it differs from ours, against that code's definition."""

from __future__ import annotations

import torch
from tests.objectives.problems import gradient, logits

from stillhouse.core.rows import Rows
from stillhouse.objectives import build


def test_the_head_without_the_token_that_crosses_the_mass() -> None:
    """AKL's code: in descending order, tokens whose cumulative probability is still below the mass."""
    student, teacher = logits(6, 40, 1), logits(6, 40, 2)
    p, q = teacher.softmax(-1), student.softmax(-1)
    ordered, index = p.sort(-1, descending=True)
    head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, index, ordered.cumsum(-1) < 0.5)
    gap = (p - q).abs()
    expected = (gap * head).sum(-1) / gap.sum(-1)
    without = build("adaptive_kl", crossing_token=False)
    assert torch.allclose(without.head_share(p, q), expected)
    assert (build("adaptive_kl").head_share(p, q) > expected).all()
    share = expected[:, None]
    forward, reverse = p * (p / q).log(), q * (q / p).log()
    value, _ = gradient(without, student, teacher, Rows())
    assert torch.allclose(value, (share * forward + (1 - share) * reverse).sum(-1))


def test_an_ab_divergence_in_the_place_of_kl() -> None:
    student, teacher = logits(5, 20, 3), logits(5, 20, 4)
    with_ab = build("alpha_mixture", alpha=0.5, teacher_share=0.5, ab=[0.7, 0.2])
    p, q, c, a, b = teacher.softmax(-1), student.softmax(-1), 0.25, 0.2, 0.7
    r = (0.5 * p**c + 0.5 * q**c) ** (1 / c)
    r = r / r.sum(-1, keepdim=True)
    parts = r**a * p**b - a / (a + b) * r ** (a + b) - b / (a + b) * p ** (a + b)
    value, _ = gradient(with_ab, student, teacher, Rows())
    assert torch.allclose(value, -parts.sum(-1) / (a * b)), "the code's D(0.2, 0.7; r, p)"
    one = build("alpha_mixture", alpha=0.5, teacher_share=0.5)
    near = build("alpha_mixture", alpha=0.5, teacher_share=0.5, ab=[1.0, 1e-7])
    first, second = (gradient(each, student, teacher, Rows())[0] for each in (one, near))
    assert torch.allclose(first, second, atol=1e-5)
