"""A mixture of several teachers' distributions is one distribution, whatever each of them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.objectives.problems import drawn_rows, gradient, logits
from torch import Tensor

from stillhouse.core.rows import Rows
from stillhouse.core.sparse import SparseLogprobs, topk_of
from stillhouse.errors import ConfigError
from stillhouse.objectives import build
from stillhouse.objectives.teacher_mixture import mixture_of

COUNT, VOCAB = 7, 12
WEIGHTS = {"main": 3.0, "code": 1.0}


def teachers() -> tuple[Tensor, Tensor]:
    first, second = (logits(COUNT, VOCAB, seed).log_softmax(-1) for seed in (1, 2))
    return first, second


def exact() -> Tensor:
    first, second = teachers()
    return (0.75 * first.exp() + 0.25 * second.exp()).log()


def loss_of(signals: dict[str, Any], **inner: Any) -> tuple[Tensor, Tensor]:
    objective = build("teacher_mixture", weights=WEIGHTS, objective=inner)
    rows = drawn_rows(COUNT, VOCAB, reference=False)
    return gradient(objective, logits(COUNT, VOCAB, 0), signals, rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "inner",
    [
        {"kind": "forward_kl"},
        {"kind": "csd"},
        {"kind": "sum", "terms": ["reverse_kl", "cross_entropy"]},
        {"kind": "policy_gradient", "discount": 0.9},
    ],
    ids=lambda inner: str(inner["kind"]),
)
def test_the_loss_is_that_of_the_mixed_distribution(inner: dict[str, Any]) -> None:
    found = loss_of(dict(zip(WEIGHTS, teachers(), strict=True)), **inner)
    rows = drawn_rows(COUNT, VOCAB, reference=False)
    wanted = gradient(build(**inner), logits(COUNT, VOCAB, 0), exact(), rows)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_what_sparse_teachers_share_is_exact_and_the_rest_is_one_outcome() -> None:
    first, second = teachers()
    mixed = mixture_of([(-0.2, topk_of(first, 5)), (-1.7, topk_of(second, 6))], VOCAB)
    assert isinstance(mixed, SparseLogprobs)
    whole = (first - 0.2).exp() + (second - 1.7).exp()
    for row in range(COUNT):
        both = set(topk_of(first, 5).ids[row].tolist()) & set(topk_of(second, 6).ids[row].tolist())
        there = mixed.ids[row] >= 0
        assert set(mixed.ids[row][there].tolist()) == both
        known = whole[row, mixed.ids[row][there]]
        torch.testing.assert_close(mixed.logprobs[row][there].exp(), known)
        assert mixed.tail is not None
        torch.testing.assert_close(mixed.tail[row].exp(), 1 - known.sum())


@pytest.mark.parametrize("first_is_whole", [True, False])
def test_a_whole_and_a_sparse_teacher_mix_over_the_tokens_of_the_sparse_one(
    first_is_whole: bool,
) -> None:
    first, second = teachers()
    signals: dict[str, Any] = {"main": first, "code": topk_of(second, 5)}
    if not first_is_whole:
        signals = {"main": topk_of(first, 5), "code": second}
    few = topk_of(second if first_is_whole else first, 5).ids
    mixed = exact()
    coarse = SparseLogprobs(few, mixed.gather(1, few), torch.log1p(-mixed.gather(1, few).exp().sum(-1)))
    value, slope = loss_of(signals, kind="reverse_kl")
    wanted = gradient(build("reverse_kl"), logits(COUNT, VOCAB, 0), coarse, Rows())  # type: ignore[arg-type]
    torch.testing.assert_close(value, wanted[0])
    torch.testing.assert_close(slope, wanted[1])
    everything = {name: topk_of(one, VOCAB) for name, one in zip(WEIGHTS, teachers(), strict=True)}
    dense = loss_of(dict(zip(WEIGHTS, teachers(), strict=True)), kind="forward_kl")
    torch.testing.assert_close(loss_of(everything, kind="forward_kl")[0], dense[0], atol=1e-6, rtol=1e-6)


def test_labels_of_one_teacher_mix_with_all_that_another_gives() -> None:
    first, second = teachers()
    labels = drawn_rows(COUNT, VOCAB).labels
    assert labels is not None
    alone = SparseLogprobs.of_labels(second.gather(1, labels[:, None]).squeeze(1))
    inner = {"kind": "policy_gradient", "discount": 0.0, "include_current": True}
    found = loss_of({"main": first, "code": alone}, **inner)
    for one, other in zip(found, loss_of({"main": first, "code": second}, **inner), strict=True):
        torch.testing.assert_close(one, other)


def test_losses_and_distributions_differ_where_they_should() -> None:
    """For forward KL a weighted sum has the gradient of the mixture, for reverse KL another optimum."""
    first, second = teachers()
    signals = {"main": first, "code": second}
    weights = {"main": 0.75, "code": 0.25}
    student, rows = logits(COUNT, VOCAB, 0), drawn_rows(COUNT, VOCAB, reference=False)
    for kind, same in (("forward_kl", True), ("reverse_kl", False)):
        terms = [{"kind": kind, "teacher_model": name, "loss_weight": w} for name, w in weights.items()]
        slope = gradient(build("sum", terms=terms), student, signals, rows)[1]  # type: ignore[arg-type]
        distance = (slope - loss_of(signals, kind=kind)[1]).abs().max()
        assert (distance < 1e-9) == same
    geometric = (0.75 * first + 0.25 * second).log_softmax(-1)
    at_optimum = gradient(build("sum", terms=terms), geometric, signals, rows)[1]  # type: ignore[arg-type]
    assert at_optimum.abs().max() < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": {"kind": "cross_entropy"}}, "has to compare with one teacher"),
        ({"objective": {"kind": "advantage"}}, "has to compare with one teacher"),
        ({"objective": {"teacher": "skew_kl"}}, "tells sources or teachers of rows apart"),
        ({"objective": {"kind": "contrastive", "alpha_rule": "gap"}}, "tells sources"),
        ({"objective": {"kind": "span"}}, "more than single tokens"),
        ({"weights": {"main": 0.0, "code": 0.0}}, "weights are all zero"),
        ({"weights": {"main": 1.0}}, "at least 2 items"),
    ],
)
def test_what_cannot_be_mixed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("teacher_mixture", **{"weights": WEIGHTS, "objective": {"kind": "forward_kl"}, **options})


def test_draws_of_one_teacher_are_no_mixture() -> None:
    found = build("teacher_mixture", weights=WEIGHTS, objective={"kind": "forward_kl"}).requirements()
    assert {need.model: need.signals for need in found.models} == dict.fromkeys(
        WEIGHTS, frozenset({"distribution", "topk"})
    )
    assert found.same_tokenizer == set(WEIGHTS)


def test_every_teacher_of_a_mixture_is_asked() -> None:
    mixture = build("teacher_mixture", weights=WEIGHTS, objective={"kind": "forward_kl"})
    assert mixture.teachers_of("student") == set(WEIGHTS)
