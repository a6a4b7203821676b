"""Every objective that has an equation in a paper, against that equation in fp64: value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.objectives.formulas import TOKEN, Problem, formula
from tests.objectives.problems import logits
from torch import Tensor

from stillhouse.core.head import ModelHead, ModelSignal
from stillhouse.core.rows import Rows
from stillhouse.core.sparse import SparseLogprobs
from stillhouse.core.types import SOURCES
from stillhouse.fused import FusedConfig, fused_rows
from stillhouse.objectives import build

V, D = 7, 5
RAGGED = [0, 0, 1, 0, 2, 3, 3, 1, 0, 3, 2]
"""Two prompts of two sequences each, of 4, 2, 2 and 3 tokens, in no order."""

ON_POLICY = {
    "kind": "policy_gradient", "single_step": False, "ratio_weight": 1.0, "reward_weight": 0.0,
    "discount": 1.0, "include_current": False, "length_normalised": False, "reward_scale": 1.0,
    "reward_clip": None, "whiten": False, "ratio_clip": None, "importance": "none", "importance_cap": None,
    "sampling_teacher_share": 0.0, "estimator": "k1",
}  # fmt: skip
GAP = {
    "kind": "contrastive", "alpha_rule": "gap", "alpha": 0.3, "alpha_least": 0.02, "alpha_most": 0.8,
    "student_share": 0.35,
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {"kind": "forward_kl", "temperature": 2.0},
    {"kind": "reverse_kl", "temperature": 0.7},
    {"kind": "symmetric_kl", "reverse_weight": 0.9},
    {"kind": "jeffreys"},
    {"kind": "jsd", "teacher_weight": 0.1},
    {"kind": "tvd"},
    {"kind": "skew_kl", "alpha": 0.1},
    {"kind": "skew_rkl", "alpha": 0.1, "detach_mixture": False},
    {"kind": "skew_rkl", "alpha": 0.3, "detach_mixture": True},
    {"kind": "adaptive_kl", "head_mass": 0.5},
    {"kind": "ab", "alpha": 0.2, "beta": 0.7},
    {"kind": "ab", "alpha": 1.0, "beta": -0.4},
    {"kind": "alpha_mixture", "alpha": -3.0, "teacher_share": 0.1, "direction": "forward"},
    {"kind": "alpha_mixture", "alpha": 3.0, "teacher_share": 0.7, "direction": "reverse"},
    {"kind": "alpha_mixture", "alpha": 1.0, "teacher_share": 0.2, "direction": "reverse"},
    {"kind": "taid", "t": 0.4},
    {"kind": "csd", "w1": "student", "w2": "student", "temperature": 1.5},
    {"kind": "csd", "w1": "teacher", "w2": "mix", "teacher_share": 0.15, "factor": "paper"},
    {"kind": "csd", "w1": "uniform", "w2": "teacher", "temperature": 0.6},
    {"kind": "dld", "weight": "teacher"},
    {"kind": "dld", "weight": "student", "center": True},
    {"kind": "uld"},
    {"kind": "contrastive", "alpha_rule": "fixed", "alpha": 0.1, "student_share": 0.75},
    GAP,
    {"kind": "dpkd", "level": "token", "scale": 0.3},
    {"kind": "dpkd", "level": "sequence", "scale": 0.5, "length_normalised": True},
    {"kind": "dpkd", "level": "sequence", "scale": 0.2, "length_normalised": False},
    {"kind": "dpo", "loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.2},
    {"kind": "dpo", "loss": "robust", "beta": 0.3, "label_smoothing": 0.1},
    {"kind": "dpo", "loss": "hinge", "beta": 0.4},
    {"kind": "dpo", "loss": "ipo", "beta": 0.5},
    {"kind": "simper"},
    {"kind": "context_contrast", "margin": 0.5},
    {"kind": "advantage", "importance": "none"},
    {"kind": "advantage", "importance": "token"},
    {"kind": "advantage", "importance": "sequence"},
    {"kind": "aligned_teacher", "weight_rule": "adaptive", "extrapolation": 15.0, "start": "teacher",
     "scale": 0.1},
    {"kind": "aligned_teacher", "weight_rule": "fixed", "extrapolation": 0.4, "start": "reference",
     "scale": 0.3},
    {**ON_POLICY, "discount": 0.0, "include_current": True, "estimator": "k3"},
    {**ON_POLICY, "discount": 0.0, "include_current": True, "importance": "token", "importance_cap": 1.1},
    {**ON_POLICY, "include_current": True, "importance": "sequence", "discount": 0.9},
    {**ON_POLICY, "single_step": True, "sampling_teacher_share": 0.2, "length_normalised": True},
    {**ON_POLICY, "single_step": True, "ratio_weight": 0.5, "discount": 0.9, "reward_scale": 0.5,
     "reward_clip": 1.0},
    {**ON_POLICY, "reward_weight": 0.7, "ratio_weight": 0.1, "estimator": "k3", "discount": 0.95},
    {**ON_POLICY, "ratio_clip": 0.1, "sampling_teacher_share": 0.2, "whiten": True, "include_current": True,
     "discount": 0.95, "length_normalised": True, "reward_scale": 0.5},
    {**ON_POLICY, "ratio_clip": 0.1, "single_step": True, "reward_weight": 1.0},
]  # fmt: skip
COARSENED = (TOKEN.keys() - {"csd", "dld", "uld", "dpkd"}) | {"contrastive"}
"""Those that mean something where all improbable tokens are one outcome."""
OF_LABELS = ("policy_gradient", "dpo", "dpkd")
"""Those that need a teacher's log-probability of each label and no more."""


def named(options: dict[str, Any]) -> str:
    return " ".join(f"{value}" for value in options.values() if value not in (None, False))


def those(holds: Callable[[dict[str, Any]], bool]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("options", [one for one in OPTIONS if holds(one)], ids=named)


every = those(lambda options: True)


def problem(
    student: Tensor, teachers: dict[str, Tensor], sequences: list[int], options: dict[str, Any]
) -> Problem:
    """Labels, rewards, and what the labels were sampled with: an earlier student, mixed with the teacher."""
    count, share = len(sequences), options.get("sampling_teacher_share", 0.0)
    labels = [(3 * row + 1) % V for row in range(count)]
    before = student.detach() + logits(count, V, 9, 0.3)
    chances = (1 - share) * before.softmax(-1) + share * teachers["main"].softmax(-1)
    return Problem(
        student,
        teachers,
        labels,
        sequences,
        preferred={one: one % 2 == 0 for one in range(4)},
        pairs={one: one // 2 for one in range(4)},
        rewards={0: 0.5, 1: -1.5, 2: 2.0, 3: 0.1},
        sampled=[math.log(float(chances[row, label])) for row, label in enumerate(labels)],
    )


def facts(given: Problem) -> Rows:
    """The same for ours."""
    codes = torch.tensor([SOURCES.index(source) for source in ("student", "teacher")])
    return Rows(
        labels=torch.tensor(given.labels),
        sources=codes[[int(given.preferred[one]) for one in given.sequences]],
        sequence_ids=torch.tensor(given.sequences),
        pair_ids=torch.tensor([given.pairs[one] for one in given.sequences]),
        rewards=torch.tensor([given.rewards[one] for one in given.sequences], dtype=torch.float64),
        sampled_logprobs=torch.tensor(given.sampled, dtype=torch.float64),
    )


def whole(given: Problem) -> Callable[[int], list[Tensor]]:
    return lambda row: given.logits(row, "main")


def compare(
    options: dict[str, Any],
    given: Problem,
    teachers: dict[str, Any],
    compared: Callable[[int], list[Tensor]],
    **near: float,
) -> None:
    rows, leaf = facts(given), given.student
    values, surrogate = formula(options, given, compared)
    (wanted,) = torch.autograd.grad(surrogate.sum(), leaf)
    found = build(**options)(leaf, teachers, rows)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    tolerance = {"rtol": 1e-9, "atol": 1e-11, **near}
    torch.testing.assert_close(found.detach(), values.detach().to(found.dtype), **tolerance)
    torch.testing.assert_close(slope, wanted.nan_to_num(0.0), **tolerance)


def models(count: int, spread: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
    teachers = {name: logits(count, V, seed, spread) for name, seed in (("main", 2), ("reference", 3))}
    return logits(count, V, 1, spread).requires_grad_(), teachers


@every
@pytest.mark.parametrize("sequences", [RAGGED, [0, 1, 2, 3]], ids=["ragged", "one token each"])
def test_value_and_gradient_are_those_of_the_equation(options: dict[str, Any], sequences: list[int]) -> None:
    given = problem(*models(len(sequences)), sequences, options)
    compare(options, given, given.teachers, whole(given))


@those(lambda options: options["kind"] != "uld")  # which has two vocabularies
def test_tokens_that_a_model_excludes_are_left_out_and_the_rest_renormalised(options: dict[str, Any]) -> None:
    student, teachers = models(len(RAGGED))
    given = problem(student, teachers, RAGGED, options)
    compared_with = "reference" if options["kind"] == "dpo" else "main"
    closed = teachers[compared_with].clone()
    open_student = student.detach().clone()
    for row, label in enumerate(given.labels):
        closed[row, (label + 1 + row % 3) % V] = -math.inf
        if row % 2:
            open_student[row, (label + 4) % V] = -math.inf
    given = replace(
        given, student=open_student.requires_grad_(), teachers={**teachers, compared_with: closed}
    )
    compare(options, given, given.teachers, whole(given))


@every
def test_logit_gaps_of_hundreds_of_nats_are_right(options: dict[str, Any]) -> None:
    student, teachers = models(len(RAGGED), spread=100.0)
    given = problem(student, teachers, RAGGED, options)
    if options["kind"] in ("policy_gradient", "advantage"):  # sampled ones are likely, as they were sampled
        student = student.detach().clone()
        student[range(len(RAGGED)), given.labels] = student.amax(1) - 1.0
        given = problem(student.requires_grad_(), teachers, RAGGED, options)
    compare(options, given, given.teachers, whole(given), rtol=1e-8, atol=1e-9)


@every
def test_bf16_logits_are_compared_as_the_numbers_that_they_are(options: dict[str, Any]) -> None:
    student, teachers = models(len(RAGGED))
    student, teachers = student.detach().bfloat16(), {name: one.bfloat16() for name, one in teachers.items()}
    exact = problem(
        student.double().requires_grad_(),
        {name: one.double() for name, one in teachers.items()},
        RAGGED,
        options,
    )
    values, surrogate = formula(options, exact, whole(exact))
    (wanted,) = torch.autograd.grad(surrogate.sum(), exact.student)
    leaf = student.requires_grad_()
    found = build(**options)(leaf, teachers, facts(exact))  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    torch.testing.assert_close(found.detach().double(), values.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(slope.double(), wanted, rtol=2e-2, atol=2e-3)


@every
@pytest.mark.parametrize("chunk", [2, 50])
def test_over_the_head_rows_without_weight_are_as_if_they_were_not_there(
    options: dict[str, Any], chunk: int
) -> None:
    """A whole pair has no weight, and one token of a sequence of the other."""
    hidden, weight = logits(11, D, 4).requires_grad_(), logits(V, D, 5, 0.7).requires_grad_()
    theirs = {
        name: (logits(11, 4, seed), logits(V, 4, seed + 1)) for name, seed in (("main", 6), ("reference", 8))
    }
    dense = {name: states @ head.t() for name, (states, head) in theirs.items()}
    given = problem(hidden @ weight.t(), dense, RAGGED, options)
    token_weight = torch.linspace(0.2, 1.2, 11, dtype=torch.float64)
    token_weight[[1, *(row for row, one in enumerate(RAGGED) if one > 1)]] = 0.0
    kept = token_weight.nonzero()[:, 0].tolist()
    left = Problem(
        given.student[kept],
        {name: one[kept] for name, one in dense.items()},
        *([one[row] for row in kept] for one in (given.labels, RAGGED)),
        *({key: one[key] for key in (0, 1)} for one in (given.preferred, given.pairs, given.rewards)),
        [given.sampled[row] for row in kept],
    )
    values, surrogate = formula(options, left, whole(left))
    wanted = torch.autograd.grad((surrogate * token_weight[kept]).sum(), (hidden, weight))
    loss, found = fused_rows(
        build(**options), hidden, weight,
        {name: ModelSignal(states, ModelHead(head)) for name, (states, head) in theirs.items()},
        token_weight=token_weight, rows=facts(given), config=FusedConfig(chunk_rows=chunk),
    )  # fmt: skip
    torch.testing.assert_close(
        found, torch.zeros_like(found).index_copy(0, torch.tensor(kept), values.detach())
    )
    torch.testing.assert_close(loss.detach(), (found * token_weight).sum())
    for got, one in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-9, atol=1e-11)


@those(lambda options: options["kind"] in COARSENED and "temperature" not in options)
def test_the_most_probable_tokens_and_one_outcome_for_the_rest_are_a_distribution(
    options: dict[str, Any],
) -> None:
    """p and q over K tokens and the mass of all others, K three in some rows and two in others."""
    given = problem(*models(len(RAGGED)), RAGGED, options)
    log_p = given.teachers["main"].log_softmax(-1)
    ids = log_p.argsort(-1, descending=True)[:, :3]
    ids[1::2, 2] = -1
    values = log_p.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -1e30)

    def compared(row: int) -> list[Tensor]:
        few = [one for one in ids[row].tolist() if one >= 0]
        rest = [one for one in range(V) if one not in few]
        both = given.student[row].log_softmax(0), log_p[row]
        return [torch.cat([one[few], one[rest].exp().sum().log()[None]]) for one in both]

    rest = torch.stack([compared(row)[1][-1] for row in range(len(RAGGED))])
    labels = log_p[range(len(RAGGED)), given.labels]
    compare(options, given, {"main": SparseLogprobs(ids, values, tail=rest, labels=labels)}, compared)


@pytest.mark.parametrize("options", [{"kind": "forward_kl"}, {"kind": "skew_kl", "alpha": 0.2}])
def test_draws_are_weighed_values_of_single_tokens(options: dict[str, Any]) -> None:
    """sum_k w_k f(p_k, q_k) with f = log p/q, or log p / (a p + (1 - a) q)."""
    given = problem(*models(4), [0, 1, 2, 3], options)
    log_p = given.teachers["main"].log_softmax(-1)
    ids, weights = torch.tensor([[0, 3], [6, 1], [2, -1], [5, 4]]), logits(4, 2, 7).exp()
    sparse = SparseLogprobs(ids, log_p.gather(1, ids.clamp_min(0)), weights=weights)
    a, wanted = options.get("alpha", 0.0), []
    for row in range(4):
        log_q = given.student[row].log_softmax(0)
        mixed = (a * log_p[row].exp() + (1 - a) * log_q.exp()).log()
        there = [(k, one) for k, one in enumerate(ids[row].tolist()) if one >= 0]
        wanted.append(sum(weights[row, k] * (log_p[row, one] - mixed[one]) for k, one in there))
    found = build(**options)(given.student, sparse)
    torch.testing.assert_close(found, torch.stack(wanted))
    slopes = [
        torch.autograd.grad(one.sum(), given.student, retain_graph=True)[0]
        for one in (found, torch.stack(wanted))
    ]
    torch.testing.assert_close(*slopes)


@those(
    lambda options: (
        options["kind"] in OF_LABELS and options.get("level") != "token" and not options.get("single_step")
    )
)
def test_the_labels_alone_are_enough_for_what_counts_them_alone(options: dict[str, Any]) -> None:
    given = problem(*models(len(RAGGED)), RAGGED, options)
    few = {}
    for name, teacher in given.teachers.items():
        labels = teacher.log_softmax(-1)[range(len(RAGGED)), given.labels]
        none = torch.zeros(len(RAGGED), 0)
        few[name] = SparseLogprobs(none.long(), none, labels=labels)
    compare(options, given, few, whole(given))
