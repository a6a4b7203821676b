"""Drawn inputs that give any objective what it says it needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.rows import Rows, TeacherRows
from stillhouse.core.types import SOURCES
from stillhouse.objectives import REGISTRY, Objective, build

TEACHER, STUDENT = SOURCES.index("teacher"), SOURCES.index("student")

REQUIRED_OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"terms": [{"kind": "forward_kl"}, {"kind": "jsd", "loss_weight": 0.3}]},
    "by_source": {"teacher": {"kind": "skew_kl"}, "student": {"kind": "jsd", "loss_weight": 2.0}},
    "by_teacher": {"objectives": {"main": {"kind": "skew_kl"}, "code": {"kind": "jsd", "loss_weight": 2.0}}},
    "teacher_mixture": {"weights": {"main": 0.6, "code": 0.2}, "objective": {"kind": "forward_kl"}},
    "clipped": {"most": 1.0, "objective": {"kind": "forward_kl"}},
    "agreement": {"contexts": ["main", "code", "reference"], "objective": {"kind": "jsd"}},
    "hidden_states": {"objective": {"kind": "reverse_kl"}},
}
"""Options of kinds that cannot do without; any other kind is tested with its defaults once it exists."""

VARIANTS: list[dict[str, Any]] = [
    {"kind": "forward_kl", "temperature": 2.0},
    {"kind": "reverse_kl", "temperature": 0.7},
    {"kind": "symmetric_kl", "reverse_weight": 0.9},
    {"kind": "jsd", "teacher_weight": 0.1},
    {"kind": "jsd", "teacher_weight": 0.9},
    {"kind": "skew_kl", "alpha": 0.0},
    {"kind": "skew_rkl", "alpha": 0.0},
    {"kind": "skew_rkl", "alpha": 0.3, "detach_mixture": True},
    {"kind": "adaptive_kl", "head_mass": 0.9},
    {"kind": "ab", "alpha": 1.0, "beta": 0.0},
    {"kind": "ab", "alpha": 0.0, "beta": 1.0},
    {"kind": "ab", "alpha": 0.5, "beta": 0.01},
    {"kind": "alpha_mixture", "alpha": 1.0, "direction": "reverse"},
    {"kind": "alpha_mixture", "alpha": 0.9, "teacher_share": 0.5},
    {"kind": "alpha_mixture", "alpha": 3.0, "direction": "reverse"},
    {"kind": "alpha_mixture", "alpha": 0.5},
    {"kind": "alpha_mixture", "alpha": -1.0, "direction": "reverse"},
    {"kind": "alpha_mixture", "alpha": 2.0, "teacher_share": 0.7},
    {"kind": "taid", "t": 1.0},
    {"kind": "csd", "w1": "teacher", "w2": "student"},
    {"kind": "csd", "w1": "uniform", "w2": "student", "temperature": 1.5},
    {"kind": "csd", "w1": "mix", "w2": "mix", "factor": "paper"},
    {"kind": "csd", "w1": "uniform", "w2": "uniform"},
    {"kind": "dld", "weight": "uniform", "center": True},
    {"kind": "dld", "weight": "teacher"},
    {"kind": "contrastive", "alpha_rule": "gap", "student_weight": 1.5, "teacher_weight": 0.5},
    {"kind": "contrastive", "alpha_rule": "gap", "teacher_gap": 0.01, "student_gap": 0.02},
    {"kind": "contrastive", "detach_mixture": False, "student_weight": 1.2},
    {"kind": "dpkd", "level": "token"},
    {"kind": "dpkd", "length_normalised": False, "scale": 0.5},
    {"kind": "dpo", "loss": "robust", "label_smoothing": 0.2, "teacher_model": "main"},
    {"kind": "dpo", "loss": "hinge", "beta": 3.0},
    {"kind": "dpo", "loss": "ipo", "teacher_model": "code"},
    {"kind": "aligned_teacher", "weight_rule": "fixed", "extrapolation": 0.5},
    {"kind": "aligned_teacher", "weight_rule": "fixed", "extrapolation": 0.5, "start": "reference"},
    {"kind": "advantage", "importance": "token"},
    {"kind": "advantage", "importance": "sequence", "teacher_model": "code"},
    {
        "kind": "policy_gradient",
        "single_step": True,
        "sampling_teacher_share": 0.2,
        "length_normalised": True,
    },
    {"kind": "policy_gradient", "discount": 0.0, "include_current": True, "estimator": "k3"},
    {"kind": "policy_gradient", "reward_weight": 0.7, "ratio_weight": 0.1, "estimator": "k3"},
    {"kind": "policy_gradient", "reward_weight": 1.0, "ratio_weight": 0.0, "discount": 0.9, "whiten": True},
    {"kind": "policy_gradient", "discount": 0.9, "ratio_clip": 0.2, "reward_clip": 1.0},
    {"kind": "policy_gradient", "discount": 0.0, "include_current": True, "importance": "token"},
    {
        "kind": "policy_gradient",
        "importance": "sequence",
        "importance_cap": 1.5,
        "sampling_teacher_share": 0.2,
    },
    {
        "kind": "policy_gradient",
        "whiten": True,
        "reward_scale": 0.5,
        "ratio_clip": 0.2,
        "sampling_teacher_share": 0.2,
    },
    {
        "kind": "sum",
        "terms": [{"kind": "policy_gradient"}, {"kind": "reverse_kl"}, {"kind": "cross_entropy"}],
    },
    {"kind": "by_source", "teacher": {"kind": "cross_entropy"}, "student": {"kind": "policy_gradient"}},
    {"kind": "adaptive_kl", "crossing_token": False},
    {"kind": "alpha_mixture", "alpha": 0.5, "teacher_share": 0.5, "ab": (0.7, 0.2)},
    {"kind": "span", "compare": "forward_kl", "order": "bayesian"},
    {"kind": "span", "compare": "reverse_kl"},
    {"kind": "transport", "blur": 0.3, "place_weight": 1.0},
    {"kind": "sum", "terms": [{"kind": "transport"}, {"kind": "span"}, {"kind": "cross_entropy"}]},
    {"kind": "sum", "terms": [{"kind": "dpkd"}, {"kind": "contrastive", "alpha_rule": "gap"}]},
    {
        "kind": "sum",
        "terms": [
            {"kind": "transport", "loss_weight": 0.5},
            {"kind": "policy_gradient", "single_step": True, "sampling_teacher_share": 0.2},
            {"kind": "contrastive", "alpha_rule": "gap"},
        ],
    },
    {"kind": "by_source", "teacher": {"kind": "transport"}, "student": {"kind": "policy_gradient"}},
    {"kind": "forward_kl", "teacher_model": "code"},
    {"kind": "teacher_mixture", "weights": {"main": 1.0, "code": 2.0}, "objective": {"kind": "csd"}},
    {
        "kind": "teacher_mixture",
        "weights": {"main": 0.5, "code": 0.25, "reference": 0.25},
        "objective": {"kind": "policy_gradient", "discount": 0.0, "include_current": True},
    },
    {
        "kind": "sum",
        "terms": [
            {"kind": "forward_kl", "loss_weight": 0.4},
            {"kind": "jsd", "teacher_model": "code", "loss_weight": 0.6},
            {"kind": "advantage", "teacher_model": "code"},
        ],
    },
    {"kind": "sum", "terms": [{"kind": "dpkd", "teacher_model": "code"}, {"kind": "reverse_kl"}]},
    {
        "kind": "agreement",
        "contexts": ["code", "reference"],
        "level": "sequence",
        "objective": {"kind": "clipped", "most": 2.0, "objective": {"kind": "reverse_kl"}},
    },
    {
        "kind": "sum",
        "terms": [
            {"kind": "agreement", "contexts": ["main", "code"], "objective": {"kind": "forward_kl"}},
            {"kind": "context_contrast", "wrong_model": "code", "loss_weight": 0.1},
        ],
    },
    {"kind": "contrastive", "alpha_rule": "gap", "teacher_model": "code"},
    {
        "kind": "sum",
        "terms": [
            {"kind": "contrastive", "alpha_rule": "gap"},
            {"kind": "contrastive", "alpha_rule": "gap", "teacher_model": "code", "loss_weight": 0.5},
            {"kind": "policy_gradient", "teacher_model": "code", "single_step": True},
        ],
    },
    {
        "kind": "by_source",
        "teacher": {"kind": "by_teacher", "objectives": {"main": "csd", "code": "reverse_kl"}},
        "student": {"kind": "policy_gradient", "teacher_model": "code"},
    },
]


def named(options: dict[str, Any]) -> str:
    rest = [
        f"{key}={'+'.join(part['kind'] for part in value) if key == 'terms' else value}"
        for key, value in options.items()
        if key != "kind" and not isinstance(value, dict)
    ]
    return " ".join([str(options["kind"]), *rest])


def cases() -> list[tuple[str, Objective]]:
    """Every registered kind with its defaults, then the variants."""
    plain = [{"kind": kind, **REQUIRED_OPTIONS.get(kind, {})} for kind in REGISTRY.kinds()]
    return [(named(options), build(**options)) for options in (*plain, *VARIANTS)]


def logits(count: int, vocab: int, seed: int, spread: float = 2.0) -> Tensor:
    """Drawn logits [count, vocab] in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, vocab, generator=generator, dtype=torch.float64)


def drawn_rows(count: int, vocab: int, seed: int = 0, reference: bool = True) -> Rows:
    """Facts of every sort for `count` rows: pairs of a teacher-written and a student-written response."""
    generator = torch.Generator().manual_seed(1000 + seed)
    pairs = 2 if count >= 8 else 1
    cuts = torch.linspace(0, count, 2 * pairs + 1).round().long()
    ids = torch.repeat_interleave(torch.arange(2 * pairs), cuts.diff())
    return Rows(
        labels=torch.randint(vocab, (count,), generator=generator),
        sources=torch.where(ids % 2 == 0, TEACHER, STUDENT),
        sequence_ids=ids,
        pair_ids=ids // 2,
        rewards=torch.randn(2 * pairs, generator=generator, dtype=torch.float64)[ids],
        sampled_logprobs=-3 * torch.rand(count, generator=generator, dtype=torch.float64) - 0.5,
        teacher_names=np.where(ids % 2 == 0, "main", "code"),
        teachers={
            "reference": TeacherRows(logits(count, vocab, seed + 77)),
            "code": TeacherRows(logits(count, vocab, seed + 78)),
        }
        if reference
        else {},
    )


def gradient(objective: Objective, student: Tensor, teacher: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Values [N] and the gradient of their sum for the student's logits."""
    leaf = student.detach().clone().requires_grad_()
    value = objective(leaf, teacher, rows)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]
