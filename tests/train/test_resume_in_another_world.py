"""A run that goes on in more or fewer processes trains on the same prompts, each once an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.children import ranks
from tests.small_runs import STUDENT, in_child, in_two, nth, outcome, run, tree, write_data

SAMPLING = {"temperature": 1.0, "max_tokens": 8}
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
    made["evaluate"] |= {"before": True, "tasks": ["fidelity"], "sampling": SAMPLING, "seeds": [3, 5]}
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
    evaluated_alike(folder / "alone", folder / "four")
    segments = json.loads((folder / "moving" / "state.json").read_text(encoding="utf-8"))["segments"]
    assert [(one["from_step"], one["processes"]) for one in segments] == [(0, 2), (2, 4), (6, 1)]
    rows = {name: outcome(folder / name)["rows"] for name in ("alone", "four", "moving")}
    for several in (rows["four"], rows["moving"]):
        for one, other in zip(rows["alone"], several, strict=True):
            assert one["step"] == other["step"]
            for fact in ("tokens", "sequences", "responses/on_policy", "responses/student"):
                assert one.get(fact) == other.get(fact), (fact, one["step"])


def evaluated_alike(alone: Path, several: Path) -> None:
    """What the untrained student wrote and how it was measured."""
    for name in ("student-before", "student-before.fidelity"):
        files = [run / "evaluation" / f"{name}.jsonl" for run in (alone, several)]
        rows = [
            [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files
        ]
        assert len(rows[0]) == 8
        assert [texts(one) for one in rows[1]] == [texts(one) for one in rows[0]]
        wanted, found = (
            json.loads((run / "evaluation" / f"{name}.json").read_text(encoding="utf-8"))["metrics"]
            for run in (alone, several)
        )
        assert found.keys() == wanted.keys()
        for metric in found.keys() - {"tokens_per_second"}:
            assert found[metric] == pytest.approx(wanted[metric], rel=1e-6), metric


def texts(row: dict[str, Any]) -> dict[str, Any]:
    """A row without sums, whose last digits depend on what shares a batch."""
    return {name: value for name, value in row.items() if name != "sums"}
