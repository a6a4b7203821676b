"""What distillm2.py compares: its methods, and the probes into why they come out as they do."""

from __future__ import annotations

from typing import Any

WRITTEN_BY_TEACHER = {"kind": "generated", "by": "teacher", "sampling": None}
"""Without a sampling of its own a policy samples as `engine` says: all models write in the same way."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "DistiLLM-2, contrastive only": {"objective": {"alpha_rule": "fixed", "student_share": 0.5}},
    "DistiLLM-2, + alpha": {"objective": {"student_share": 0.5}},
    "DistiLLM-2, + beta": {"objective": {"alpha_rule": "fixed"}},
    "DistiLLM-2": {},
}
METHODS: dict[str, dict[str, Any]] = {
    "SeqKD": {"recipe": "seqkd", "responses": WRITTEN_BY_TEACHER},
    "SFT": {"recipe": "sft"},
    "KD": {"recipe": "kd", "responses": WRITTEN_BY_TEACHER},
    "GKD": {"recipe": "gkd", "responses": {"sampling": None, "base": WRITTEN_BY_TEACHER}},
    "DistiLLM": {
        "recipe": "distillm",
        "responses": {
            "student_share": {"start": 0.5, "tolerance": 0.0},
            "sampling": None,
            "base": WRITTEN_BY_TEACHER,
        },
    },
    "CSD": {"recipe": "csd", "responses": WRITTEN_BY_TEACHER},
    **{name: {"recipe": "distillm2", **changes} for name, changes in ABLATIONS.items()},
    "CSD on pairs": {"recipe": "csd_pairs"},
}
"""SeqKD comes first: the other methods of a seed take its teacher's text."""
PAIRED = ("distillm2", "csd_pairs", "dpkd")

CONTRASTIVE = {"alpha_rule": "fixed", "student_share": 0.5}
OTHERS: dict[str, dict[str, Any]] = {
    "DPKD": {"recipe": "dpkd"},
    "DistiLLM-2, + released beta": {
        "objective": {"alpha_rule": "fixed", "student_share": {"kind": "gradual_beta", "rule": "released"}},
        "recipe": "distillm2",
    },
    "contrastive only, alpha 0.01": {"objective": {**CONTRASTIVE, "alpha": 0.01}, "recipe": "distillm2"},
    "contrastive only, alpha 0.3": {"objective": {**CONTRASTIVE, "alpha": 0.3}, "recipe": "distillm2"},
    "contrastive only, beta 0.25": {
        "objective": {**CONTRASTIVE, "student_share": 0.25}, "recipe": "distillm2",
    },
    "contrastive only, beta 0.75": {
        "objective": {**CONTRASTIVE, "student_share": 0.75}, "recipe": "distillm2",
    },
}  # fmt: skip
PROBES: dict[str, tuple[dict[str, Any], tuple[str, ...], int]] = {
    "All text at DistiLLM-2's temperature 0.8 and top-p 0.95": (
        {"temperature": 0.8, "top_p": 0.95},
        ("SeqKD", "KD", "GKD", "DistiLLM-2, contrastive only", "DistiLLM-2"),
        1,
    ),
    "What alpha and beta do as constants": (
        {},
        ("SeqKD", "DistiLLM-2, contrastive only", "contrastive only, alpha 0.01",
         "contrastive only, alpha 0.3", "contrastive only, beta 0.25", "contrastive only, beta 0.75"),
        1,
    ),
    "A student fine-tuned on all 3,101 labels for 600 steps before": (
        {"labelled": 3101, "warm_steps": 600},
        ("SeqKD", "SFT", "KD", "GKD", "DistiLLM", "CSD", *ABLATIONS, "contrastive only, beta 0.25",
         "DistiLLM-2, + released beta", "CSD on pairs", "DPKD"),
        3,
    ),
}  # fmt: skip
"""What is varied -> the fields of `Size` that change, the methods, and how many seeds."""
