"""Values and gradients of the papers' released code, recorded beside the checkout."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tests.conftest import shared

from stillhouse.core.rows import Rows
from stillhouse.core.types import SOURCES
from stillhouse.objectives import build

pytestmark = pytest.mark.needs_shared

WEIGHTS = {"S": "student", "T": "teacher", "U": "uniform"}
KINDS: dict[str, dict[str, Any]] = {
    "forward_kl_cross_entropy": {"kind": "forward_kl"},
    "reverse_kl": {"kind": "reverse_kl"},
    "symmetric_kl_lam0.9": {"kind": "symmetric_kl", "reverse_weight": 0.9},
    "js_distance_lam0.9": {"kind": "jsd", "teacher_weight": 0.1},
    "js_distance_lam0.5": {"kind": "jsd", "teacher_weight": 0.5},
    "tv_distance": {"kind": "tvd"},
    "skewed_forward_kl_cross_entropy_lam0.1": {"kind": "skew_kl", "alpha": 0.1},
    "skewed_forward_kl_cross_entropy_lam0.3": {"kind": "skew_kl", "alpha": 0.3},
    "skewed_reverse_kl_lam0.1": {"kind": "skew_rkl", "alpha": 0.1},
    "skewed_reverse_kl_lam0.3": {"kind": "skew_rkl", "alpha": 0.3},
    "ab_alpha0.2_beta0.7": {"kind": "ab", "alpha": 0.2, "beta": 0.7},
    **{
        f"csd_{a}{b}": {"kind": "csd", "w1": WEIGHTS[a], "w2": WEIGHTS[b]}
        for a, b in ("SS", "TT", "US", "TS", "UU", "UT")
    },
    **{f"dld_{a}": {"kind": "dld", "weight": WEIGHTS[a]} for a in WEIGHTS},
}
TEACHER_ENTROPY_LEFT_IN = {
    "forward_kl_cross_entropy": 1.0,
    "skewed_forward_kl_cross_entropy_lam0.1": 1.0,
    "skewed_forward_kl_cross_entropy_lam0.3": 1.0,
    "symmetric_kl_lam0.9": 0.1,
}
"""How much of the teacher's entropy the released value holds beyond the divergence."""


def load(name: str) -> list[dict[str, Any]]:
    path = shared() / "golden" / name
    return json.loads(path.read_text()) if path.exists() else []


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("case", range(3))
def test_released_losses(name: str, case: int) -> None:
    golden = load("objectives.json")[case]
    recorded = golden["objectives"][name]
    student = torch.tensor(golden["student_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(golden["teacher_logits"], dtype=torch.float64)
    mask = torch.tensor(golden["response_mask"]).bool()
    loss = build(**KINDS[name])(student[mask], teacher[mask]).mean()
    (gradient,) = torch.autograd.grad(loss, student)
    log_p = teacher[mask].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    expected = recorded["loss"] - TEACHER_ENTROPY_LEFT_IN.get(name, 0.0) * float(entropy)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(gradient, torch.tensor(recorded["grad"]).double(), rtol=1e-4, atol=1e-5)


def test_no_released_loss_is_left_out() -> None:
    for golden in load("objectives.json"):
        assert set(golden["objectives"]) == set(KINDS)


@pytest.mark.parametrize("case", range(3))
def test_released_contrastive_loss_with_its_curriculum_on(case: int) -> None:
    golden = load("contrastive.json")[case]
    leaves, rows, weights, teacher, student = [], [], [], [], []
    for source in ("teacher", "student"):
        ours = torch.tensor(golden[f"student_logits_on_{source}_response"], dtype=torch.float64)
        theirs = torch.tensor(golden[f"teacher_logits_on_{source}_response"], dtype=torch.float64)
        labels = torch.tensor(golden[f"{source}_response_labels"])[:, 1:]
        leaves.append(ours.requires_grad_())
        counted = labels != -100
        sequence = torch.arange(len(labels))[:, None].expand_as(labels)
        student.append(ours[:, :-1][counted])
        teacher.append(theirs[:, :-1][counted])
        weights.append((counted / counted.sum(-1, keepdim=True))[counted] / len(labels))
        rows.append((labels[counted], sequence[counted] + len(labels) * len(rows), SOURCES.index(source)))
    facts = Rows(
        labels=torch.cat([row[0] for row in rows]),
        sequence_ids=torch.cat([row[1] for row in rows]),
        sources=torch.cat([torch.full_like(row[0], row[2]) for row in rows]),
    )
    anchored = golden["anchor_teacher"] is not None
    objective = build(
        "contrastive",
        alpha=golden["base_alpha"],
        alpha_rule="gap" if anchored else "fixed",
        teacher_gap=golden["anchor_teacher"] if anchored else "batch",
        student_gap=golden["anchor_student"] if anchored else "batch",
        teacher_weight=2 - golden["beta"],
        student_weight=golden["beta"],
    )
    loss = (objective(torch.cat(student), torch.cat(teacher), facts) * torch.cat(weights)).sum()
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-5)
    gradients = torch.autograd.grad(loss, leaves)
    for source, gradient in zip(("teacher", "student"), gradients, strict=True):
        expected = torch.tensor(golden[f"grad_on_{source}_response"]).double()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
