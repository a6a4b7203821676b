"""A preference stage after distillation: one file, one folder, and a killed stage goes on where it was."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillhouse import run
from stillhouse.errors import ConfigError, DataError
from stillhouse.files import read_jsonl, write_jsonl
from stillhouse.report import load_run
from stillhouse.report.systems import gather
from stillhouse.runs.estimate import estimate
from stillhouse.runs.resolve import resolve
from tests.small_runs import in_child, rows_of, tree, write_data

STAGE = {
    "lr": 1e-3, "batch_size": 8, "micro_batch_size": 4, "max_steps": 3, "log_every": 1, "save_every": 1,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path, rows=24, valid=4)
    return tmp_path


def chained(folder: Path, name: str, kind: str, **changes: Any) -> dict[str, Any]:
    pairs = str(folder / "pairs.jsonl")
    valid = {"kind": "jsonl", "path": pairs, "limit": 6}
    stage = {"kind": kind, "data": pairs, "valid": valid, **STAGE, **changes.pop("preference", {})}
    train = {"max_steps": 3, "validate_every": "never", "save_every": "never"}
    return tree(folder, name, recipe="kd", preference=stage, train=train, **changes)


def _reaches(name: str, _: str, file: str) -> bool:
    return name in file


def student(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "student" / "model.safetensors")


@pytest.mark.parametrize("kind", ["dpo", "simper"])
def test_a_killed_stage_goes_on_and_ends_as_the_straight_run(folder: Path, kind: str) -> None:
    assert in_child(chained(folder, "straight", kind)) == 0
    seal = "killed/preference/checkpoints/checkpoint-2/complete.json"
    assert in_child(chained(folder, "killed", kind), die=partial(_reaches, seal)) < 0
    before = (folder / "killed" / "metrics.jsonl").read_text(encoding="utf-8")
    assert in_child(chained(folder, "killed", kind), resume=True) == 0
    assert (folder / "killed" / "metrics.jsonl").read_text(encoding="utf-8") == before  # no step of it again
    straight, killed = student(folder, "straight"), student(folder, "killed")
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    logs = [rows_of(folder / name / "preference") for name in ("straight", "killed")]
    steps = [[(row["step"], row["loss"]) for row in log] for log in logs]
    assert steps[0] == steps[1]
    assert [step for step, _ in steps[0]] == [1, 2, 3]
    start = torch.load(folder / "straight" / "preference" / "start" / "weights.pt", weights_only=True)
    assert any(not torch.equal(start[name], straight[name]) for name in straight)

    card = (folder / "straight" / "student" / "README.md").read_text(encoding="utf-8")
    assert f"Then on preference pairs: `{{kind: {kind}," in card
    record = load_run(folder / "straight")
    found = {(one.task, one.role): one.metrics for one in gather([record])}
    distilled, after = (found["preference", role] for role in ("distilled", "after"))
    assert distilled["kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert after["kl_to_reference"] > 0
    assert distilled["reward_margin"] == 0 != after["reward_margin"]
    assert record.state["preference"]["max_steps"] == 3


def test_dpo_is_that_of_the_equation_on_our_tokens(folder: Path) -> None:
    """The first step's loss is log 2, and the second's that of the margins that the log has."""
    run(chained(folder, "dpo", "dpo", preference={"micro_batch_size": 8, "max_steps": 2}))
    first, second = rows_of(folder / "dpo" / "preference")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert second["loss"] == pytest.approx(0.693147 - second["rewards/margins"] / 2, abs=2e-3)


def test_an_adapter_goes_through_the_stage(folder: Path) -> None:
    config = chained(folder, "lora", "dpo", preference={"max_steps": 1, "valid": None})
    config["student"] = {**config["student"], "lora": {"rank": 2}}
    result = run(config)
    assert result.state == "done"
    assert (folder / "lora" / "student" / "model.safetensors").is_file()


def test_the_stage_is_checked_before_anything_is_trained(folder: Path) -> None:
    found = estimate(resolve(chained(folder, "run", "dpo")).config)
    assert found["preference stage"] == "dpo, 24 pairs, 3 optimiser steps"
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "q", "response": "no pair"}])
    with pytest.raises(DataError, match=r"preference\.data needs a preference pair in each row"):
        run(chained(folder, "run", "dpo"))
    with pytest.raises(ConfigError, match=r"preference\.data: .* no such file"):
        run(chained(folder, "run", "dpo", preference={"data": str(folder / "none.jsonl")}))
    idle = resolve(chained(folder, "run", "dpo", preference={"loss": "ipo", "label_smoothing": 0.1}))
    assert any("label_smoothing" in note and "preference.loss is ipo" in note for note in idle.notes)
    assert not (folder / "run").exists()


def test_a_stage_is_not_added_to_a_finished_run(folder: Path) -> None:
    config = chained(folder, "run", "simper", preference={"valid": None})
    stage = config.pop("preference")
    run(config)
    with pytest.raises(ConfigError, match=r"was finished with other values.*name=NEW --from"):
        run({**config, "preference": stage}, resume=True)
    result = run(
        {
            **config,
            "name": "next",
            "output": {"folder": str(folder / "next"), "report": False},
            "preference": stage,
        },
        start_from=folder / "run",
    )
    assert json.loads((result.folder / "state.json").read_text(encoding="utf-8"))["parent"]["run"] == "run"


def test_a_stage_on_swapped_pairs_is_that_on_pairs_written_the_other_way(folder: Path) -> None:
    write_jsonl(
        folder / "other-way.jsonl",
        [
            {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            for row in read_jsonl(folder / "pairs.jsonl")
        ],
    )
    for name, changes in (
        ("swapped", {"swap": True}),
        ("written", {"data": str(folder / "other-way.jsonl")}),
        ("straight", {}),
    ):
        run(chained(folder, name, "simper", preference={"max_steps": 2, "valid": None, **changes}))
    swapped, written, straight = (student(folder, name) for name in ("swapped", "written", "straight"))
    assert all(torch.equal(swapped[name], written[name]) for name in swapped)
    assert any(not torch.equal(swapped[name], straight[name]) for name in swapped)
