"""Fidelity against torch.distributions and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from stillhouse.errors import DataError
from stillhouse.evaluate.metrics.distributions import Fidelity


def logits(rows: int = 37, vocabulary: int = 19) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        3 * torch.randn(rows, vocabulary, generator=generator),
        3 * torch.randn(rows, vocabulary, generator=generator),
    )


def measured(student: torch.Tensor, teacher: torch.Tensor, split: int = 1000, chunk: int = 512):
    fidelity = Fidelity(chunk)
    for some_student, some_teacher in zip(student.split(split), teacher.split(split), strict=True):
        fidelity.update(some_student, some_teacher)
    return fidelity.scores()


def test_equals_torch_distributions():
    student, teacher = logits()
    scores = measured(student, teacher)
    p, q = Categorical(logits=teacher.double()), Categorical(logits=student.double())
    assert scores.kl_to_teacher == pytest.approx(kl_divergence(p, q).mean().item(), rel=1e-5)
    assert scores.reverse_kl_to_teacher == pytest.approx(kl_divergence(q, p).mean().item(), rel=1e-5)
    assert scores.tvd == pytest.approx((p.probs - q.probs).abs().sum(-1).mean().item() / 2, rel=1e-5)
    assert scores.top1_agreement == (student.argmax(-1) == teacher.argmax(-1)).double().mean().item()
    assert scores.tokens == 37


@pytest.mark.parametrize(("split", "chunk"), [(1, 512), (5, 2), (37, 3), (36, 36)])
def test_does_not_depend_on_batches_and_chunks(split, chunk):
    whole, parts = measured(*logits()), measured(*logits(), split=split, chunk=chunk)
    assert parts.as_metrics() == pytest.approx(whole.as_metrics(), rel=1e-6)


def test_two_tokens_by_hand():
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.4, 0.6]])
    scores = measured(q.log(), p.log())
    assert scores.kl_to_teacher == pytest.approx(
        0.75 * math.log(0.75 / 0.4) + 0.25 * math.log(0.25 / 0.6), rel=1e-6
    )
    assert scores.reverse_kl_to_teacher == pytest.approx(
        0.4 * math.log(0.4 / 0.75) + 0.6 * math.log(0.6 / 0.25), rel=1e-6
    )
    assert scores.tvd == pytest.approx(0.35, rel=1e-6)
    assert scores.top1_agreement == 0.0


def test_equal_models_are_at_zero():
    student, _ = logits()
    scores = measured(student, student)
    assert (scores.kl_to_teacher, scores.reverse_kl_to_teacher, scores.tvd) == (0.0, 0.0, 0.0)
    assert scores.top1_agreement == 1.0


def test_tokens_that_both_exclude_change_nothing():
    student, teacher = logits()
    padding = torch.full((37, 5), -torch.inf)
    padded = measured(torch.cat([student, padding], 1), torch.cat([teacher, padding], 1))
    assert padded.as_metrics() == pytest.approx(measured(student, teacher).as_metrics(), rel=1e-6)


def test_a_token_that_only_the_student_excludes_is_infinitely_far():
    scores = measured(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]]))
    assert scores.kl_to_teacher == math.inf
    assert scores.reverse_kl_to_teacher == pytest.approx(math.log(2))
    assert scores.tvd == pytest.approx(0.5)


def test_very_unlike_models_stay_finite():
    scores = measured(torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]]))
    assert scores.kl_to_teacher == pytest.approx(300.0)


def test_bad_input_is_refused():
    student, teacher = logits()
    with pytest.raises(ValueError, match="one shape"):
        Fidelity().update(student[:, :4], teacher)
    with pytest.raises(DataError, match="NaN"):
        Fidelity().update(student * torch.nan, teacher)
    with pytest.raises(DataError, match="no response positions"):
        Fidelity().scores()
