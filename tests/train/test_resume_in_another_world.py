"""A run that goes on in more or fewer processes trains on the same prompts, each once an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.children import ranks
from tests.small_runs import STUDENT, in_child, in_two, nth, outcome, run, tree, write_data

WITHOUT_DROPOUT = {**STUDENT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("worlds")
    write_data(made)
    return made


def options(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """18 prompts in steps of 4: the last step of an epoch has two, and more processes than that share it."""
    made = tree(folder, name, **changes)
    made["student"]["from_config"] = WITHOUT_DROPOUT
    made["train"] |= {"hf": {"optim": "sgd"}, "lr": 0.1, "micro_batch_size": 1, "schedule": "cosine"}
    return made


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = outcome(folder / name)["weights"]
    return found


def test_it_ends_as_a_run_of_one_process(folder: Path) -> None:
    method = {
        "objective": {"fixed": "forward_kl", "student": "reverse_kl", "text": "cross_entropy"},
        "responses": {"kind": "mixed", "student_share": 0.4, "sampling": {"temperature": 0.0}},
        "data": {"text": str(folder / "text.jsonl"), "text_block": 8},
    }
    assert in_child(options(folder, "alone", **method)) == 0
    assert ranks(4, run, options(folder, "four", **method)) == [0] * 4
    moving = options(folder, "moving", **method)
    assert -9 in in_two(moving, die=nth(1, "os.rename", "checkpoint-4/complete.json"))
    assert ranks(4, run, moving, True, nth(1, "os.rename", "checkpoint-8/complete.json")) != [0] * 4
    assert in_child(moving, resume=True) == 0
    alone = weights(folder, "alone")
    for name in ("four", "moving"):
        for key, value in weights(folder, name).items():
            torch.testing.assert_close(value, alone[key], rtol=0, atol=2e-4)
    segments = json.loads((folder / "moving" / "state.json").read_text(encoding="utf-8"))["segments"]
    assert [(one["from_step"], one["processes"]) for one in segments] == [(0, 2), (2, 4), (6, 1)]
    rows = {name: outcome(folder / name)["rows"] for name in ("alone", "four", "moving")}
    for several in (rows["four"], rows["moving"]):
        for one, other in zip(rows["alone"], several, strict=True):
            assert one["step"] == other["step"]
            for fact in ("tokens", "sequences", "responses/on_policy", "responses/student"):
                assert one.get(fact) == other.get(fact), (fact, one["step"])
