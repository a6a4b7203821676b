"""Which GPU a process takes, where there are several; the GPUs are made up, because tests have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from stillhouse.models import local_device
from stillhouse.runs.resolve import resolve
from stillhouse.runs.training_arguments import training_arguments


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == torch.device("cuda", 3)
    assert taken == [torch.device("cuda", 0), torch.device("cuda", 3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == torch.device("cpu")


def test_a_process_beside_several_gpus_trains_on_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setup = TrainingArguments._setup_devices

    def several(self: Any) -> torch.device:
        device: torch.device = setup.func(self) if hasattr(setup, "func") else setup.fget(self)
        self._n_gpu = 4
        return device

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(several))
    config = resolve(
        {
            "student": {"path": "student"},
            "data": {"train": "train.jsonl"},
            "objective": "cross_entropy",
            "train": {"batch_size": 8, "micro_batch_size": 4, "validate_every": "never"},
        }
    ).config
    arguments = training_arguments(config, tmp_path)
    assert arguments.train_batch_size == 4
    assert arguments.gradient_accumulation_steps == 2
