"""Objectives over a teacher that says something about a few tokens of each row."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.objectives.problems import cases, drawn_rows, logits
from torch import Tensor

from stillhouse.core.head import ModelHead, ModelSignal
from stillhouse.core.sparse import (
    EXCLUDED,
    SparseLogprobs,
    concat_sparse,
    empty_sparse,
    sampled_of,
    scatter_sparse,
    topk_of,
)
from stillhouse.fused import FusedConfig, fused_rows
from stillhouse.objectives import Objective, build

COUNT, VOCAB = 9, 12


def few_tokens(objective: Objective, form: str) -> list[str]:
    """The teachers that may tell an objective about a few tokens only."""
    needs = objective.requirements()
    return sorted(name for name in needs.model_names if form in needs.accepted(name))


def those(form: str) -> pytest.MarkDecorator:
    chosen = [case for case in cases() if few_tokens(case[1], form)]
    return pytest.mark.parametrize("objective", [o for _, o in chosen], ids=[name for name, _ in chosen])


def distributions(seed: int = 1) -> Tensor:
    return torch.log_softmax(logits(COUNT, VOCAB, seed), -1)


def value_and_slope(objective: Objective, student: Tensor, teacher: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = objective(leaf, teacher, drawn_rows(COUNT, VOCAB))
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


def labels() -> Tensor:
    found = drawn_rows(COUNT, VOCAB).labels
    assert found is not None
    return found


@those("topk")
def test_with_all_tokens_it_is_the_exact_loss(objective: Objective) -> None:
    student, teacher = logits(COUNT, VOCAB, 0), distributions()
    whole = dict.fromkeys(objective.requirements().model_names, teacher)
    few = dict.fromkeys(few_tokens(objective, "topk"), topk_of(teacher, VOCAB, labels()))
    for got, wanted in zip(
        value_and_slope(objective, student, {**whole, **few}),
        value_and_slope(objective, student, whole),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "kind", ["forward_kl", "reverse_kl", "jeffreys", "jsd", "tvd", "skew_kl", "skew_rkl"]
)
def test_a_tail_in_one_piece_hides_some_of_a_divergence_and_less_with_more_tokens(kind: str) -> None:
    objective, student, teacher = build(kind), logits(COUNT, VOCAB, 0), distributions()
    values = [objective(student, topk_of(teacher, count)) for count in (1, 3, 6, 9)]
    values.append(objective(student, teacher))
    for fewer, more in itertools.pairwise(values):
        assert (fewer <= more + 1e-12).all()
    assert (values[0] < values[-1] - 1e-3).any()


@those("topk")
def test_fused_equals_plain_over_the_most_probable_tokens(objective: Objective) -> None:
    compare_fused(objective, topk_of(distributions(), 4, labels()))


@those("sampled")
def test_fused_equals_plain_over_draws(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(3)
    compare_fused(objective, sampled_of(distributions(), 5, generator, 1.3, labels()))


def compare_fused(objective: Objective, sparse: SparseLogprobs) -> None:
    """All teachers that may be sparse are, and each of them alone, beside whole distributions."""
    names = few_tokens(objective, sparse.form)
    for few in (names, *([name] for name in names)) if len(names) > 1 else (names,):
        compare_fused_of(objective, dict.fromkeys(few, sparse))


def compare_fused_of(objective: Objective, sparse: dict[str, SparseLogprobs]) -> None:
    hidden, weight = logits(COUNT, 5, 2).requires_grad_(), logits(VOCAB, 5, 3, 0.7).requires_grad_()
    rows = drawn_rows(COUNT, VOCAB)
    token_weight = torch.linspace(0.1, 1.0, COUNT, dtype=torch.float64)
    if not objective.sequence_level:
        token_weight[3] = 0.0
    dense = {
        name: (logits(COUNT, 4, 5 + more), ModelHead(logits(VOCAB, 4, 15 + more, 0.7)))
        for more, name in enumerate(sorted(objective.requirements().model_names - sparse.keys()))
    }
    full = {name: head.logits(states) for name, (states, head) in dense.items()}
    value = objective(hidden @ weight.t(), {**full, **sparse}, rows)
    wanted = torch.autograd.grad((value * token_weight).sum(), (hidden, weight))
    loss, values = fused_rows(
        objective,
        hidden,
        weight,
        {
            **{name: ModelSignal(*one) for name, one in dense.items()},
            **{name: ModelSignal(one) for name, one in sparse.items()},
        },
        token_weight=token_weight,
        rows=rows,
        config=FusedConfig(chunk_rows=4),
    )
    torch.testing.assert_close(values, (value * (token_weight != 0)).detach(), rtol=1e-9, atol=1e-11)
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["forward_kl", "skew_kl"])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_draws_are_unbiased_in_value_and_gradient(kind: str, temperature: float) -> None:
    objective, student = build(kind), logits(COUNT, VOCAB, 0)
    teacher = torch.log_softmax(logits(COUNT, VOCAB, 1, 0.8), -1)  # no token too rare to be drawn here
    generator = torch.Generator().manual_seed(0)
    wanted = torch.cat([one.flatten() for one in value_and_slope(objective, student, teacher)])
    found = []
    for _ in range(1500):
        compact = sampled_of(teacher, 6, generator, temperature)
        found.append(torch.cat([one.flatten() for one in value_and_slope(objective, student, compact)]))
    draws = torch.stack(found)
    error = (draws.mean(0) - wanted).abs() / (draws.std(0) / len(found) ** 0.5 + 1e-9)
    assert error.max() < 4.5, "standard errors; about 120 numbers are compared"
    assert draws.std(0).max() > 0.05, "a few draws are noisy, or this shows nothing"


@pytest.mark.parametrize("kind", ["forward_kl", "skew_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_over_all_possible_draws_is_the_exact_loss(
    kind: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, vocab, draws = build(kind), 4, 3
    student, teacher = logits(1, vocab, 0), torch.log_softmax(logits(1, vocab, 1, 2.0), -1)

    def numbers(given: Tensor | SparseLogprobs) -> Tensor:
        leaf = student.clone().requires_grad_()
        value = objective(leaf, given)
        return torch.cat([value.detach(), torch.autograd.grad(value.sum(), leaf)[0].flatten()])

    wanted = numbers(teacher)
    proposal = torch.softmax(teacher / temperature, -1)[0]
    mean, mass = torch.zeros_like(wanted), 0.0
    for outcome in itertools.product(range(vocab), repeat=draws):
        monkeypatch.setattr(torch, "multinomial", lambda *_, row=outcome, **__: torch.tensor([row]))
        compact = sampled_of(teacher, draws, temperature=temperature)
        chance = float(proposal[list(outcome)].prod())
        mean, mass = mean + chance * numbers(compact), mass + chance
    assert mass == pytest.approx(1.0)
    torch.testing.assert_close(mean, wanted, rtol=1e-9, atol=1e-11)


def test_a_truncated_teacher_without_its_tail_would_be_biased() -> None:
    """What the tail is for: the top alone, renormalised, pulls the student away from the teacher."""
    teacher = distributions()
    whole, cut = topk_of(teacher, 3), topk_of(teacher, 3)
    cut = replace(cut, tail=torch.full_like(whole.tail, EXCLUDED))  # type: ignore[arg-type]
    slope = value_and_slope(build("forward_kl"), teacher, whole)[1]
    assert slope.abs().max() < 1e-12, "at the teacher itself there is no force"
    assert value_and_slope(build("forward_kl"), teacher, cut)[1].abs().max() > 0.01


@those("labels")
def test_the_labels_alone_are_enough_where_nothing_else_counts(objective: Objective) -> None:
    """Alone, and where rows without a signal are filled in."""
    student, teacher = logits(COUNT, VOCAB, 0), distributions()
    alone = SparseLogprobs.of_labels(teacher.gather(1, labels()[:, None]).squeeze(1))
    parts = concat_sparse([alone[:4], alone[4:]])
    scattered = scatter_sparse(parts, torch.arange(COUNT), COUNT)
    names = few_tokens(objective, "labels")
    assert alone.form == scattered.form == empty_sparse("labels", 3, torch.device("cpu")).form == "labels"
    whole = dict.fromkeys(objective.requirements().model_names, teacher)
    found = value_and_slope(objective, student, {**whole, **dict.fromkeys(names, scattered)})
    for one, exact in zip(found, value_and_slope(objective, student, whole), strict=True):
        torch.testing.assert_close(one, exact)


def test_entries_that_are_missing_or_beyond_the_students_vocabulary_take_no_part() -> None:
    student, teacher = logits(COUNT, VOCAB, 0), distributions()
    short = topk_of(teacher, 3)
    longer = concat_sparse([short[:4], topk_of(teacher, 5)[4:]])
    objective = build("reverse_kl")
    torch.testing.assert_close(objective(student, longer)[:4], objective(student, short)[:4])
    beyond = replace(short, ids=short.ids.clone())
    beyond.ids[:, 1] = VOCAB + 3
    value, slope = value_and_slope(objective, student, beyond)
    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_rows_without_a_signal_fill_the_gaps() -> None:
    teacher = topk_of(distributions(), 3, labels())
    whole = scatter_sparse(teacher[:2], torch.tensor([1, 4]), 6)
    assert len(whole) == 6
    assert torch.equal(whole.ids[[1, 4]], teacher.ids[:2])
    assert (whole.ids[[0, 2, 3, 5]] == -1).all()
    assert (empty_sparse("sampled", 3, torch.device("cpu")).ids == -1).all()


def test_what_needs_all_pairs_of_tokens_says_so() -> None:
    student, compact = logits(COUNT, VOCAB, 0), topk_of(distributions(), 3)
    for kind in ("csd", "dld", "uld"):
        with pytest.raises(ValueError, match=f"{kind} cannot be computed from a teacher's top"):
            build(kind)(student, compact)
    with pytest.raises(ValueError, match="forward_kl cannot be computed from a teacher's labels"):
        build("forward_kl")(student, SparseLogprobs.of_labels(compact.logprobs[:, 0]))
    with pytest.raises(ValueError, match="log-probability of each label"):
        build("policy_gradient")(student, compact, drawn_rows(COUNT, VOCAB))
    with pytest.raises(ValueError, match="forward_kl cannot be computed"):
        build("forward_kl", temperature=2.0)(student, compact)
