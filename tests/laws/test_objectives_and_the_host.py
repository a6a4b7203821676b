"""From hidden states to gradients nothing is asked of the device, for every objective and model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.fused.test_cross_tokenizer import CROSS, OURS, THEIRS, M, N, aligned_rows
from tests.models.test_load import ARCHITECTURES, made
from tests.no_sync import HostSync, NoHostSync
from tests.objectives.problems import VARIANTS, cases, drawn_rows, logits, named
from torch import Tensor

from stillhouse.core.head import ModelHead, ModelSignal
from stillhouse.core.rows import Rows
from stillhouse.core.sparse import sampled_of, topk_of
from stillhouse.data.collate import collate
from stillhouse.fused import FusedConfig, fused_label_facts, fused_rows
from stillhouse.models import head_of, hidden_rows, layer_rows
from stillhouse.objectives import Objective, build
from stillhouse.objectives.mixtures import _head_by_bisection, head_mask
from stillhouse.objectives.registry import parse_objective
from stillhouse.objectives.transport import _potentials

COUNT, VOCAB = 12, 13
CASES = cases()
every = pytest.mark.parametrize("objective", [case[1] for case in CASES], ids=[case[0] for case in CASES])


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: int(x.max()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.unique_consecutive(x, return_counts=True),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_mode_refuses_what_waits_for_a_device(ask: Callable[[Tensor], Any]) -> None:
    with NoHostSync(), pytest.raises(HostSync):
        ask(torch.ones(3))


def test_the_mode_lets_through_what_does_not_wait() -> None:
    with NoHostSync():
        x = torch.arange(6.0)[torch.tensor([1, 2])]
        x[1:] += torch.where(x[1:] > 0, 1.0, 0.0)
    assert x.tolist() == [1.0, 3.0]


Models = tuple[Tensor, ModelHead, dict[str, ModelSignal]]
"""Hidden states and head of a student, and its teachers."""


def refused_nothing(
    objective: Objective,
    models: Models,
    rows: Rows,
    token_weight: Tensor | None,
) -> None:
    """Forward and backward in chunks of few rows, of which each objective sees several."""
    hidden, head, teachers = models
    leaves = [one for one in (hidden, head.weight, head.bias) if one is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    config = FusedConfig(chunk_rows=5)
    with NoHostSync():
        loss, values = fused_rows(objective, hidden, head, teachers, None, token_weight, rows, config)
        (2 * loss).backward()
    assert values.isfinite().all()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def facts(count: int, masked: bool = False) -> Rows:
    """Of every sort, as a batch makes them: what decides shapes is on the host."""
    mask = np.arange(count) % 4 > 0 if masked else np.ones(count, dtype=bool)
    return replace(drawn_rows(count, VOCAB, reference=False), loss_mask=mask)


def drawn_models(bias: bool = False) -> Models:
    head = ModelHead(logits(VOCAB, 5, 2), logits(VOCAB, 1, 6)[:, 0] if bias else None, softcap=9.0)
    assert not head.excludes  # read once, before the first step
    teachers = {
        name: ModelSignal(logits(COUNT, 4, seed), ModelHead(logits(VOCAB, 4, seed + 2)))
        for seed, name in enumerate(("main", "reference", "code"))
    }
    return logits(COUNT, 5, 0), head, teachers


@every
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_no_objective_asks_the_device(objective: Objective, bias: bool) -> None:
    masked = not (objective.sequence_level or objective.granularity == "sequence")
    rows = facts(COUNT, masked)
    refused_nothing(objective, drawn_models(bias), rows, torch.from_numpy(rows.loss_mask / COUNT))


@pytest.mark.parametrize(
    "options", [v for v in VARIANTS if v["kind"] in ("contrastive", "by_source")], ids=named
)
@pytest.mark.parametrize("order", ["mixed", "one source"])
def test_nor_where_sources_are_mixed_or_one_is_missing(options: dict[str, Any], order: str) -> None:
    rows = facts(COUNT)
    number = rows.sequence_ids
    assert number is not None
    sources = np.array([2, 1, 1, 2] if order == "mixed" else [1, 1, 1, 1])[number]
    refused_nothing(build(**options), drawn_models(), replace(rows, sources=sources), None)


@every
def test_nor_do_the_label_facts_of_a_whole_batch(objective: Objective) -> None:
    given = facts(COUNT, masked=True)
    models = drawn_models()
    with NoHostSync():
        rows = fused_label_facts(objective, *models, rows=given)
    assert rows.loss_mask is given.loss_mask, "so that the loss after it need not ask for the weights"
    assert rows.student_logprobs is not None
    assert rows.student_logprobs.isfinite().all()


@every
@pytest.mark.parametrize("form", ["topk", "sampled"])
def test_nor_with_teachers_of_few_tokens(objective: Objective, form: str) -> None:
    rows, logprobs = facts(COUNT), torch.log_softmax(logits(COUNT, VOCAB, 1), -1)
    sparse = (topk_of if form == "topk" else sampled_of)(logprobs, 4, labels=rows.labels)
    hidden, head, teachers = drawn_models()
    needs = objective.requirements()
    few = {name: ModelSignal(sparse) for name in needs.model_names if form in needs.accepted(name)}
    refused_nothing(objective, (hidden, head, {**teachers, **few}), rows, None)


@pytest.mark.parametrize("options", CROSS, ids=[str(number) for number in range(len(CROSS))])
@pytest.mark.parametrize("masked", [False, True])
def test_nor_between_two_tokenizers(options: dict[str, Any], masked: bool) -> None:
    mask = np.arange(N) > 2 if masked else np.ones(N, dtype=bool)
    heads = ModelHead(logits(OURS, 5, 8)), ModelHead(logits(THEIRS + 3, 4, 11), vocab=THEIRS)
    models = logits(N, 5, 7), heads[0], {"main": ModelSignal(logits(M, 4, 10), heads[1])}
    rows = replace(aligned_rows(), loss_mask=mask)
    refused_nothing(parse_objective(options), models, rows, torch.from_numpy(mask / N))


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers, of which none can be read: what is no CPU takes the paths of a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)


def without_numbers(objective: Objective, models: Models, rows: Rows) -> None:
    """Forward and backward on the meta device."""

    def moved(head: ModelHead) -> ModelHead:
        return replace(head, weight=head.weight.to("meta"))

    hidden, head, teachers = models
    there = {name: ModelSignal(one.signal.to("meta"), moved(one.head)) for name, one in teachers.items()}
    leaf, weight = hidden.to("meta").requires_grad_(), torch.ones(len(hidden), device="meta")
    config = FusedConfig(chunk_rows=5)
    loss, _ = fused_rows(objective, leaf, moved(head), there, None, weight, rows.to("meta"), config)
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == hidden.shape


@every
def test_no_objective_needs_a_number_from_the_device(objective: Objective, meta: None) -> None:
    without_numbers(objective, drawn_models(), facts(COUNT))


@pytest.mark.parametrize("options", CROSS, ids=[str(number) for number in range(len(CROSS))])
def test_nor_does_one_between_two_tokenizers(options: dict[str, Any], meta: None) -> None:
    heads = ModelHead(logits(OURS, 5, 8)), ModelHead(logits(THEIRS + 3, 4, 11), vocab=THEIRS)
    rows = replace(aligned_rows(), loss_mask=np.arange(N) > 2)
    models = logits(N, 5, 7), heads[0], {"main": ModelSignal(logits(M, 4, 10), heads[1])}
    without_numbers(parse_objective(options), models, rows)


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "mixtral"])  # sorts by expert
def test_no_model_asks_the_device_for_its_hidden_states(kind: str) -> None:
    model = made(kind)
    batch = collate(tiny.responses(3), tiny.PAD)
    with NoHostSync():
        head_of(model)
        hidden_rows(model, batch).square().sum().backward()
        _, layers = layer_rows(model, batch, (0.0, 1.0))
        rows = batch.rows()
    assert layers[0.0].shape[0] == rows.count == batch.num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.9999])
def test_the_head_of_a_distribution_is_the_same_without_sorting(dtype: torch.dtype, mass: float) -> None:
    probabilities = torch.softmax(logits(50, 700, 3), -1).to(dtype)
    assert torch.equal(_head_by_bisection(probabilities, mass), head_mask(probabilities, mass))
    ties = torch.tensor([[0.125] * 8], dtype=dtype)
    assert _head_by_bisection(ties, 0.3).sum() == 3
    one = torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype)
    assert _head_by_bisection(one, mass).tolist() == [[False, True, False]]


def test_transport_on_a_device_takes_all_steps_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the end is not seen: the steps after it change nothing."""
    costs = [logits(5, 7, 1).abs(), logits(6, 6, 2).abs(), (points := logits(6, 3, 3))]
    costs[2] = (points[:, None] - points[None]).square().sum(-1)
    seen = [_potentials(cost, 1e-10, None) for cost in costs]
    monkeypatch.setattr("stillhouse.objectives.transport.known", lambda flag: None)
    for cost, found in zip(costs, seen, strict=True):
        for got, wanted in zip(_potentials(cost, 1e-10, None), found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
