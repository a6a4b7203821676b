"""Laws that hold for every registered objective; a new one is tested by existing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objectives.problems import cases, drawn_rows, gradient, logits

from stillhouse.core.head import ModelHead, ModelSignal
from stillhouse.core.rows import TeacherRows
from stillhouse.fused import FusedConfig, fused_rows
from stillhouse.objectives import REGISTRY, Objective, build
from stillhouse.objectives.registry import parse_objective

COUNT, VOCAB = 8, 11
CASES = cases()
RATIOS = {"student_logprobs": 7, "sequence_ratios": 8}
"""Facts that a sequence-level objective finds filled in, and the seed with which they are drawn."""


def those(holds: Callable[[Objective], bool]) -> pytest.MarkDecorator:
    """Over every registered objective for which a law is meant."""
    chosen = [(name, objective) for name, objective in CASES if holds(objective)]
    assert chosen
    return pytest.mark.parametrize(
        "objective", [case[1] for case in chosen], ids=[case[0] for case in chosen]
    )


every = those(lambda objective: True)


def problem(seed: int = 0, count: int = COUNT, vocab: int = VOCAB):
    return logits(count, vocab, seed), logits(count, vocab, seed + 1), drawn_rows(count, vocab, seed)


@every
def test_gives_one_finite_number_per_row(objective: Objective) -> None:
    value, slope = gradient(objective, *problem())
    assert value.shape == (COUNT,)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    assert slope.abs().max() > 0, "an objective without a gradient trains nothing"


@those(
    lambda objective: objective.exact_gradient
)  # others hold parts constant: their closed forms are tested
def test_gradient_matches_finite_differences(objective: Objective) -> None:
    student, teacher, rows = problem()
    _, slope = gradient(objective, student, teacher, rows)
    direction = logits(COUNT, VOCAB, 9)
    step = 1e-5
    up = objective(student + step * direction, teacher, rows).sum()
    down = objective(student - step * direction, teacher, rows).sum()
    assert (up - down) / (2 * step) == pytest.approx(float((slope * direction).sum()), rel=1e-6, abs=1e-8)


@those(lambda objective: not objective.has_sequence_part)
def test_closed_form_gradient_is_that_of_the_definition(objective: Objective) -> None:
    student, teacher, rows = problem(3)
    if objective.sequence_level:
        gaps = [logits(COUNT, 1, seed)[:, 0] for seed in (5, 6)]
        known = {
            name: replace(facts, sequence_gaps=gaps[0], mean_gaps=gaps[1], agreement=gaps[0].exp())
            for name, facts in rows.teachers.items()
        }
        drawn = {name: logits(COUNT, 1, seed)[:, 0] for name, seed in RATIOS.items()}
        rows = replace(
            rows, teachers={"main": TeacherRows(None, None, *gaps, gaps[1].exp()), **known}, **drawn
        )
    rows = rows.with_signals({"main": teacher})
    leaf = student.clone().requires_grad_()
    value = objective.token_values(leaf, rows)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    scratch = rows.with_signals({name: rows.logits(name).clone() for name in rows.teachers})
    got_value, got_slope = objective.token_values_and_gradient(student.clone(), scratch)
    torch.testing.assert_close(got_value, value.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got_slope, slope, rtol=1e-9, atol=1e-10)


@those(lambda objective: objective.divergence)
def test_divergence_is_zero_where_the_models_agree_and_positive_elsewhere(objective: Objective) -> None:
    student, teacher, rows = problem()
    rows = rows.with_signals(dict.fromkeys(rows.teachers, teacher))
    shift = 1.7 if objective.shift_invariant else 0.0
    value, slope = gradient(objective, teacher + shift, teacher, rows)
    assert value.abs().max() < 1e-12
    assert slope.abs().max() < 1e-12 or objective.name in ("tvd", "uld"), "the kink of an absolute value"
    assert objective(student, teacher, rows).min() > 1e-4


@every
def test_shifting_the_logits_of_a_row_changes_nothing(objective: Objective) -> None:
    student, teacher, rows = problem()
    value, slope = gradient(objective, student, teacher, rows)
    if not objective.shift_invariant:
        shifted, _ = gradient(objective, student + 3.0, teacher, rows)
        assert (shifted - value).abs().min() > 1e-3, "an objective that is invariant should say so"
        return
    constant = logits(COUNT, 1, 4)
    shifted, shifted_slope = gradient(objective, student + constant, teacher - 2 * constant, rows)
    torch.testing.assert_close(shifted, value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(shifted_slope, slope, rtol=1e-9, atol=1e-10)
    assert slope.sum(-1).abs().max() < 1e-10


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_finite_for_logit_gaps_of_ten_thousand(objective: Objective, dtype: torch.dtype) -> None:
    student, teacher, rows = problem()
    student[0, 3] += 1e4
    teacher[0, 5] += 1e4
    student[1, 2] -= 1e4
    teacher[2, 2] -= 1e4
    student[4, 3] += 200
    value, slope = gradient(objective, student.to(dtype), teacher.to(dtype), rows)
    assert value.isfinite().all()
    assert slope.isfinite().all()


@every
def test_entries_of_minus_infinity_are_left_out(objective: Objective) -> None:
    student, teacher, rows = problem()
    kept = VOCAB - 3
    rows = replace(rows, labels=rows.labels % kept)
    student[:, kept] = -torch.inf
    teacher[:, kept + 1] = -torch.inf
    student[:, kept + 2] = teacher[:, kept + 2] = -torch.inf
    for name in rows.teachers:
        rows.logits(name)[:, kept + 1] = -torch.inf
    value, slope = gradient(objective, student, teacher, rows)
    assert slope.isfinite().all()
    if objective.shares_vocabulary and objective.needs_teacher:
        without = rows.with_signals({name: rows.logits(name)[:, :kept] for name in rows.teachers})
        expected, expected_slope = gradient(objective, student[:, :kept], teacher[:, :kept], without)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(slope[:, :kept], expected_slope, rtol=1e-9, atol=1e-10)
        assert (slope[:, kept:] == 0).all()


@every
def test_half_precision_logits_are_compared_in_fp32(objective: Objective) -> None:
    student, teacher, rows = problem()
    half = student.bfloat16(), teacher.bfloat16()
    value = objective(*half, rows)
    assert value.dtype == torch.float32
    exact = objective(half[0].double(), half[1].double(), rows)
    torch.testing.assert_close(value.double(), exact, rtol=2e-4, atol=2e-5)


@every
def test_order_of_rows_and_of_the_vocabulary_does_not_matter(objective: Objective) -> None:
    student, teacher, rows = problem()
    value, slope = gradient(objective, student, teacher, rows)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    if objective.sequence_level or objective.granularity == "sequence":  # tokens keep their order
        order = torch.argsort(order[rows.sequence_ids], stable=True)
    moved, moved_slope = gradient(objective, student[order], teacher[order], rows[order])
    torch.testing.assert_close(moved, value[order])
    torch.testing.assert_close(moved_slope, slope[order])
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
    others = {name: rows.logits(name)[:, ids] for name in rows.teachers}
    renamed = replace(rows, labels=ids.argsort()[rows.labels]).with_signals(others)
    moved, moved_slope = gradient(objective, student[:, ids], teacher[:, ids], renamed)
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(moved_slope, slope[:, ids])


@every
def test_another_teacher_gives_another_gradient(objective: Objective) -> None:
    student, teacher, rows = problem()
    if not objective.needs_teacher:
        assert torch.equal(objective(student, None, rows), objective(student, teacher, rows))
        return
    slope = gradient(objective, student, teacher, rows)[1]
    another = logits(COUNT, VOCAB, 50)
    if "main" not in objective.requirements().model_names:
        rows = rows.with_signals(dict.fromkeys(rows.teachers, another))
    other = gradient(objective, student, another, rows)[1]
    assert not torch.allclose(slope, other)


@every
def test_no_gradient_reaches_the_teacher(objective: Objective) -> None:
    student, teacher, rows = problem()
    teacher.requires_grad_()
    objective(student.requires_grad_(), teacher, rows).sum().backward()
    assert teacher.grad is None


@every
def test_what_is_needed_and_missing_is_named(objective: Objective) -> None:
    student, teacher, _ = problem()
    beyond = sorted((objective.requirements().rows - {"label_logprobs"}) | objective.other_models)
    if not beyond:
        assert objective(student, teacher).shape == (COUNT,)
        return
    with pytest.raises(ValueError, match=beyond[0]):
        objective(student, teacher)


@every
def test_survives_a_round_trip_through_plain_data(objective: Objective) -> None:
    assert parse_objective(objective.model_dump()) == objective
    assert hash(objective) == hash(parse_objective(objective.model_dump()))


@every
@settings(deadline=None, max_examples=6, derandomize=True)
@given(count=st.integers(2, 14), vocab=st.integers(3, 24), chunk=st.integers(1, 16), seed=st.integers(0, 99))
def test_fused_equals_plain(objective: Objective, count: int, vocab: int, chunk: int, seed: int) -> None:
    student_hidden, teacher_hidden = logits(count, 5, seed), logits(count, 4, seed + 1)
    weight, teacher_weight = logits(vocab + seed % 3, 5, seed + 2, 0.7), logits(vocab, 4, seed + 3, 0.7)
    others = {
        name: (logits(count, 3, seed + 4 + more), logits(vocab, 3, seed + 5 + more, 0.7))
        for more, name in enumerate(("reference", "code"))
    }
    if objective.sequence_level or objective.granularity == "sequence" or seed % 2:
        token_weight = torch.linspace(0.1, 1.0, count, dtype=torch.float64)
    else:
        token_weight = (torch.arange(count) % 3 > 0).double() / count
    known = {name: hidden @ head.t() for name, (hidden, head) in others.items()}
    rows = drawn_rows(count, vocab, seed).with_signals(known)
    leaves = [student_hidden.requires_grad_(), weight.requires_grad_()]
    compared = weight[:vocab] if objective.shares_vocabulary else weight
    value = objective(student_hidden @ compared.t(), teacher_hidden @ teacher_weight.t(), rows)
    if not objective.needs_teacher:
        value = objective(student_hidden @ weight.t(), None, rows)
    expected = torch.autograd.grad((value * token_weight).sum(), leaves)
    teachers = {"main": (teacher_hidden, teacher_weight), **others}
    signals = {name: ModelSignal(hidden, ModelHead(head)) for name, (hidden, head) in teachers.items()}
    loss, values = fused_rows(
        objective,
        student_hidden,
        weight,
        signals,
        token_weight=token_weight,
        rows=replace(rows, teachers={}),
        config=FusedConfig(chunk_rows=chunk),
    )
    torch.testing.assert_close(values, (value * (token_weight != 0)).detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(loss.detach(), (values * token_weight).sum())
    for got, wanted in zip(torch.autograd.grad(2 * loss, leaves), expected, strict=True):
        torch.testing.assert_close(got, 2 * wanted, rtol=1e-8, atol=1e-10)


@every
def test_rows_without_weight_are_a_loss_of_zero(objective: Objective) -> None:
    """As in a process whose share of a step is used up."""
    hidden, weight = logits(COUNT, 5, 0).requires_grad_(), logits(VOCAB, 5, 1).requires_grad_()
    signals = {
        name: ModelSignal(logits(COUNT, 4, seed), ModelHead(logits(VOCAB, 4, seed + 1)))
        for name, seed in (("main", 2), ("reference", 4), ("code", 6))
    }
    rows = replace(drawn_rows(COUNT, VOCAB, 0), teachers={})
    nothing = torch.zeros(COUNT, dtype=torch.float64)
    loss, values = fused_rows(objective, hidden, weight, signals, token_weight=nothing, rows=rows)
    loss.backward()
    assert loss == 0
    assert (values == 0).all()
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("kind", REGISTRY.kinds())
def test_the_docstring_says_what_a_reader_needs(kind: str) -> None:
    part = REGISTRY[kind]
    text = inspect.getdoc(part) or ""
    for heading in ("Equation", "Gradient", "Character", "When", "Source"):
        assert f"\n{heading}: " in text, f"{kind} lacks {heading}"
    undocumented = [
        name for name, field in part.model_fields.items() if name != "kind" and not field.description
    ]
    assert not undocumented


def test_every_objective_of_the_specification_is_there() -> None:
    wanted = (
        "cross_entropy forward_kl reverse_kl symmetric_kl jeffreys jsd tvd skew_kl skew_rkl adaptive_kl ab "
        "alpha_mixture taid csd dld contrastive dpkd dpo policy_gradient uld advantage aligned_teacher sum "
        "by_source simper"
    )
    assert set(wanted.split()) <= set(REGISTRY.kinds())
    assert build("skew_kl", alpha=0.1).model_dump()["alpha"] == 0.1
