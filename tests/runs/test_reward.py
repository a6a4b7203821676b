"""A reward model from pairs, and a student that is trained by it, as a user does both."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stillhouse.errors import ConfigError, ModelError
from stillhouse.files import read_jsonl, write_jsonl
from stillhouse.models import load_reward_model, rewards
from stillhouse.runs.resolve import resolve
from stillhouse.runs.reward import RewardRun, reward_run, train_reward_model
from tests.children import end, start
from tests.small_runs import (
    Event,
    announce,
    differences,
    in_child,
    nth,
    outcome,
    rows_of,
    signal,
    tree,
    write_data,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a student after a few steps, and a reward model from it."""
    made = tmp_path_factory.mktemp("reward")
    write_data(made, rows=24)
    rows = read_jsonl(made / "pairs.jsonl")
    write_jsonl(made / "words.jsonl", [with_more_the(row, place % 4) for place, row in enumerate(rows)])
    config = tree(made, "sft", recipe="sft", train={"max_steps": 20, "lr": 1e-2, "save_every": "never"})
    del config["teacher"]
    assert in_child(config) == 0
    assert in_process(made, "straight") == 0
    return made


def with_more_the(row: dict[str, Any], count: int) -> dict[str, Any]:
    """A pair whose chosen response says "the" more often than the rejected one."""
    words = row["chosen"].split()
    chosen, rejected = (" ".join([*["the"] * n, *words[n:6]]) for n in (count + 2, count))
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def reward_tree(folder: Path, name: str) -> RewardRun:
    """24 steps on pairs, a checkpoint after each 8."""
    text = {
        "name": name,
        "model": str(folder / "sft" / "student"),
        "data": {
            "train": str(folder / "words.jsonl"),
            "valid": str(folder / "words.jsonl"),
            "template": "plain",
            "max_response": 16,
        },
        "lr": 1e-2,
        "max_steps": 24,
        "batch_size": 8,
        "save_every": 8,
        "output": str(folder / name),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    return reward_run(folder / f"{name}.yaml", [])


def in_process(folder: Path, name: str, resume: bool = False, die: Event | None = None) -> int:
    return end(start(_train, reward_tree(folder, name), resume, die))


def _train(config: RewardRun, resume: bool, die: Event | None) -> None:
    if die is not None:
        announce(die, signal.SIGKILL)
    try:
        train_reward_model(config, resume)
    except BaseException:  # noqa: BLE001  (the child must end here, whatever it was)
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def test_it_learns_the_pairs_and_is_an_ordinary_folder(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = yaml.safe_load((folder / "straight" / "accuracy.json").read_text(encoding="utf-8"))
    assert found["train"] == found["valid"] > 0.9
    place = folder / "straight" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    ids = AutoTokenizer.from_pretrained(place)(["A mill", "A longer text on a mill"])["input_ids"]
    alone = [model(input_ids=torch.tensor([one])).logits.item() for one in ids]
    assert rewards(load_reward_model(str(place)), ids) == pytest.approx(alone, abs=1e-5)


def test_resumed_is_straight(folder: Path) -> None:
    assert in_process(folder, "killed", die=nth(1, "open", "checkpoint-16/optimizer.pt")) < 0
    assert in_process(folder, "killed", resume=True) == 0
    one, other = (load_file(folder / name / "model" / "model.safetensors") for name in ("straight", "killed"))
    assert differences(one, other) == []


def test_a_constant_rate_has_its_warmup() -> None:
    config = RewardRun.model_validate({"model": "m", "data": {"train": "p.jsonl"}, "schedule": "constant"})
    assert config.arguments()["lr_scheduler_type"] == "constant_with_warmup"
    assert config.arguments()["warmup_steps"] == 0.1


def test_what_cannot_be_is_refused(folder: Path) -> None:
    config = reward_tree(folder, "straight")
    with pytest.raises(ConfigError, match="output: is there already"):
        train_reward_model(config)
    with pytest.raises(ConfigError, match="has finished"):
        train_reward_model(config, resume=True)
    with pytest.raises(ConfigError, match=r"mdel.*unknown key.*did you mean"):
        reward_run(folder / "straight.yaml", ["mdel=x"])
    with pytest.raises(ModelError, match="is no reward model"):
        load_reward_model(str(folder / "sft" / "student"))


def rewarded(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """PPO with the reward model and a penalty for leaving the student as it was."""
    student = str(folder / "sft" / "student")
    return tree(
        folder,
        name,
        student={"path": student},
        teacher=None,
        teachers={"reference": {"kind": "live", "path": student, "dtype": "float32"}},
        objective={
            "kind": "policy_gradient",
            "teacher_model": "reference",
            "ratio_weight": 0.02,
            "reward_weight": 1.0,
            "include_current": True,
            "whiten": True,
            "ratio_clip": 0.2,
        },
        responses={
            "kind": "batched",
            "generate_batches": 2,
            "epochs": 2,
            "reward_model": str(folder / "straight" / "model"),
            "sampling": {"temperature": 1.0, "logprobs": True},
        },
        train={"max_steps": 40, "batch_size": 16, "micro_batch_size": 16, "log_every": 4, "lr": 1e-2},
        **changes,
    )


def test_policy_gradient_raises_the_reward_and_resumes_as_straight(folder: Path) -> None:
    config = rewarded(folder, "ppo")
    assert in_child(config) == 0
    found = [row["responses/reward"] for row in rows_of(folder / "ppo") if row["phase"] == "train"]
    assert found[-1] > found[0] + 0.3
    again = rewarded(folder, "ppo-killed")
    assert in_child(again, die=nth(3, "open", "optimizer.pt")) < 0
    assert in_child(again, resume=True) == 0
    assert not differences(outcome(folder / "ppo"), outcome(folder / "ppo-killed"))


def test_a_reward_without_a_weight_and_a_weight_without_a_reward_are_told(folder: Path) -> None:
    config = rewarded(folder, "x")
    del config["responses"]["reward_model"]
    with pytest.raises(ConfigError, match=r"needs the reward of each response.*responses\.reward_model"):
        resolve(config)
    config = rewarded(folder, "x")
    config["objective"]["reward_weight"] = 0.0
    assert any("responses.reward_model" in note for note in resolve(config).notes)
