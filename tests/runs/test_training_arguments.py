"""Every field of TrainingArguments is passed on, set by an option of ours, or refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from stillhouse.errors import ConfigError, EnvironmentFault
from stillhouse.runs.checks import preflight
from stillhouse.runs.resolve import resolve
from stillhouse.runs.training_arguments import (
    CONTROLLED_BY,
    FIXED,
    PASSED_ON,
    WITHOUT_EFFECT,
    training_arguments,
)
from stillhouse.train.config import TrainConfig


def tree(**train: Any) -> dict[str, Any]:
    return {
        "student": {"path": "student"},
        "data": {"train": "train.jsonl"},
        "objective": "cross_entropy",
        "train": train,
    }


def arguments(folder: Path, **train: Any) -> Any:
    return training_arguments(resolve(tree(**train)).config, folder)


def test_every_field_is_in_one_of_the_lists() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    lists = [set(CONTROLLED_BY), set(FIXED), set(WITHOUT_EFFECT), set(PASSED_ON)]
    assert sorted(fields - set().union(*lists)) == []
    assert sum(map(len, lists)) == len(set().union(*lists)), "a field is in two lists"


@pytest.mark.parametrize("name", sorted({*CONTROLLED_BY, *FIXED, *WITHOUT_EFFECT}))
def test_what_a_run_sets_or_does_itself_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"train\.hf\.{name}") as caught:
        arguments(tmp_path, hf={name: 1})
    if name in CONTROLLED_BY:
        assert f"Set {CONTROLLED_BY[name]}." in str(caught.value)


def test_a_budget_of_tokens_stands_for_the_number_of_prompts(tmp_path: Path) -> None:
    made = arguments(tmp_path, batch_size=6, micro_batch_tokens=4096)
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (6, 1)
    told = resolve(tree(batch_size=6, micro_batch_size=2, micro_batch_tokens=4096)).notes
    assert [line for line in told if "micro_batch_size=2" in line and "micro_batch_tokens decides" in line]


def test_a_constant_learning_rate_has_its_warm_up(tmp_path: Path) -> None:
    made = arguments(tmp_path, schedule="constant", warmup=0.5, max_steps=8)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        made.lr_scheduler_type, optimiser, num_warmup_steps=made.get_warmup_steps(8), num_training_steps=8
    )
    rates = []
    for _ in range(8):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


def test_what_this_machine_cannot_do_is_refused_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    real = tree() | {"student": {"path": "package:stillhouse/demo/teacher"}, "data": {"train": str(rows)}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="float16 cannot be trained on a CPU"):
        preflight(resolve(real, ["student.dtype=float16"]).config)
    with pytest.raises(EnvironmentFault, match="kind vllm needs"):
        preflight(resolve(real, ["engine.kind=vllm"]).config)
    with pytest.raises(ConfigError, match="Relative paths start at the working directory"):
        preflight(resolve(real, ["data.train=absent.jsonl"]).config)


def test_adamw_is_fused_unless_somebody_says_otherwise(tmp_path: Path) -> None:
    assert arguments(tmp_path).optim == "adamw_torch_fused"
    assert arguments(tmp_path, hf={"optim": "adamw_torch"}).optim == "adamw_torch"


@pytest.mark.parametrize(
    ("batch", "micro"), [(1, 1), (2, 2), (6, 6), (8, 8), (12, 6), (13, 1), (20, 5), (24, 8), (30, 6)]
)
def test_the_default_micro_batch_divides_the_batch(batch: int, micro: int) -> None:
    assert TrainConfig(batch_size=batch).micro_batch_size == micro
    assert TrainConfig(batch_size=batch, micro_batch_size=1).micro_batch_size == 1
    by_tokens = TrainConfig(batch_size=batch, micro_batch_tokens=99)
    assert "micro_batch_size" not in by_tokens.model_fields_set, "nobody set what has no effect"
