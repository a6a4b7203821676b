"""UniSD's terms against their formulas, written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.objectives.problems import gradient, logits

from stillhouse.core.rows import Rows, TeacherRows
from stillhouse.errors import ConfigError
from stillhouse.objectives import build
from stillhouse.objectives.logits import label_logprobs

N, V = 12, 7
IDS = np.repeat([0, 1, 2], [6, 4, 2])


def facts() -> tuple[torch.Tensor, dict[str, torch.Tensor], Rows]:
    """Logits of the student and of three teachers, and rows in three sequences."""
    labels = torch.arange(N) % V
    teachers = {name: logits(N, V, seed) for seed, name in enumerate(("main", "second", "third"), start=1)}
    known = {name: TeacherRows(one) for name, one in teachers.items()}
    return logits(N, V, 0), teachers, Rows(labels=labels, sequence_ids=IDS, teachers=known)


def weights_by_hand(teachers: dict[str, torch.Tensor], labels: torch.Tensor, scale: float) -> np.ndarray:
    found = np.stack([label_logprobs(one, labels).numpy() for one in teachers.values()])
    spread = found.var(0)
    weight = np.maximum(0.01, 1 / (1 + scale * np.minimum(spread / np.quantile(spread, 0.95), 10)))
    return weight / np.array([weight[sequence == IDS].mean() for sequence in IDS])


def test_agreement_weighs_tokens() -> None:
    student, teachers, rows = facts()
    assert rows.labels is not None
    inner = build("reverse_kl")
    objective = build("agreement", contexts=list(teachers), objective={"kind": "reverse_kl"}, scale=3.0)
    weight = torch.from_numpy(weights_by_hand(teachers, rows.labels, 3.0))
    plain, slope = gradient(inner, student, teachers["main"], rows)
    value, weighted = gradient(objective, student, teachers["main"], rows)
    torch.testing.assert_close(value, weight * plain)
    torch.testing.assert_close(weighted, weight[:, None] * slope)
    for sequence in range(3):  # sum w l / sum w of each sequence is the mean of the values
        own = sequence == IDS
        mean = (weight[own] * plain[own]).sum() / weight[own].sum()
        torch.testing.assert_close(value[own].mean(), mean)


def test_agreement_weighs_sequences() -> None:
    student, teachers, rows = facts()
    assert rows.labels is not None
    objective = build(
        "agreement", contexts=list(teachers), objective={"kind": "reverse_kl"}, level="sequence", scale=0.5
    )
    found = np.stack([label_logprobs(one, rows.labels).numpy() for one in teachers.values()])
    means = np.stack([found[:, sequence == IDS].mean(1) for sequence in range(3)])
    weight = torch.from_numpy(np.exp(-0.5 * means.var(1)))[IDS]
    plain = build("reverse_kl")(student, teachers["main"], rows)
    torch.testing.assert_close(objective(student, teachers["main"], rows), weight * plain)


def test_contexts_that_agree_change_nothing() -> None:
    student, teachers, rows = facts()
    rows = rows.with_signals(dict.fromkeys(teachers, teachers["main"]))
    objective = build("agreement", contexts=list(teachers), objective={"kind": "jsd"})
    expected = build("jsd")(student, teachers["main"], rows)
    torch.testing.assert_close(objective(student, teachers["main"], rows), expected)


def test_a_clip_bounds_values_and_stops_their_gradient() -> None:
    student, teachers, rows = facts()
    plain, slope = gradient(build("forward_kl"), student, teachers["main"], rows)
    most = float(plain.median())
    value, clipped = gradient(
        build("clipped", most=most, objective={"kind": "forward_kl"}), student, teachers["main"], rows
    )
    torch.testing.assert_close(value, plain.clamp(max=most))
    torch.testing.assert_close(clipped, torch.where((plain <= most)[:, None], slope, 0.0))
    assert (plain > most).any()


def test_a_wrong_context_is_left_behind() -> None:
    student, teachers, rows = facts()
    assert rows.labels is not None
    q, good, bad = (
        label_logprobs(one, rows.labels) for one in (student, teachers["main"], teachers["second"])
    )
    expected = (0.5 + (q - good).abs() - (q - bad).abs()).clamp_min(0)
    objective = build("context_contrast", wrong_model="second")
    torch.testing.assert_close(objective(student, teachers["main"], rows), expected)
    assert (expected == 0).any()
    assert (expected > 0).any()


def test_hidden_states_are_compared_number_by_number() -> None:
    _, _, rows = facts()
    ours, theirs = logits(N, 5, 8).float(), logits(N, 5, 9).float()
    objective = build("hidden_states", objective={"kind": "jsd"}, weight=0.25)
    value = objective.per_layers({1.0: ours}, {1.0: theirs}, rows)
    torch.testing.assert_close(value, 0.25 * ((ours - theirs) ** 2).mean(1))
    assert objective.depths == (1.0,)
    with pytest.raises(ConfigError, match="widths 5 and 4"):
        objective.per_layers({1.0: ours}, {1.0: theirs[:, :4]}, rows)


def test_what_cannot_be_changed_row_by_row_is_refused() -> None:
    for inner in ({"kind": "dpkd"}, {"kind": "transport"}, {"kind": "jsd", "loss_weight": 0.5}):
        with pytest.raises((ValidationError, ConfigError), match=r"alone|has no effect"):
            build("clipped", objective=inner)
    with pytest.raises((ValidationError, ConfigError), match="agrees with itself"):
        build("agreement", contexts=["main", "main"], objective={"kind": "jsd"})
