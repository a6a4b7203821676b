"""Whole runs under DeepSpeed's ZeRO on two processes without a GPU: as in one, also resumed, and saved whole.

DeepSpeed lies in a folder of its own (`make test` installs it there): merely installed, it is imported by
every training of accelerate. So one Python that has it on its path does all the runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.children import ranks, write_to
from tests.conftest import ROOT
from tests.small_runs import STUDENT, TEACHER, announce, nth, rows_of, tree_of_recipe, write_data
from tests.train import deepspeed_on_cpu

import stillhouse

PACKAGE = Path(sys.prefix) / "deepspeed"
WITHOUT_DROPOUT = STUDENT | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

pytestmark = pytest.mark.skipif(
    not PACKAGE.is_dir(), reason="DeepSpeed is not installed in .venv/deepspeed (make test)"
)


def run(tree: dict[str, Any], kind: str = "", resume: bool = False, dies: bool = False) -> None:
    if kind:
        os.environ.update(deepspeed_on_cpu.asked(kind, Path(tree["output"]["folder"]).parent))
        deepspeed_on_cpu.switch_on()
    if dies:  # while the second checkpoint is sealed
        announce(nth(2, "os.rename", "complete.json"), 9)
    stillhouse.run(tree, resume=resume)


def resume_alone(tree: dict[str, Any], folder: Path) -> None:
    """Resume as the one process of a launcher, and leave what it says in a file."""
    os.environ.update(RANK="0", LOCAL_RANK="0")
    write_to(folder / "alone.out", folder / "alone.err")
    run(tree, "zero3", resume=True)


def all_runs(folder: Path) -> None:
    """In the Python that has DeepSpeed."""
    codes = {
        "one": ranks(1, run, short(folder, "one", "gkd")),
        "one-lora": ranks(1, run, short(folder, "one-lora", "kd", lora={"rank": 2, "merge": False})),
        "zero2": ranks(2, run, short(folder, "zero2", "kd", lora={"rank": 2, "merge": False}), "zero2"),
        "zero3, killed": ranks(2, run, short(folder, "zero3", "gkd"), "zero3", False, True),
        "zero3, in one": ranks(1, resume_alone, short(folder, "zero3", "gkd"), folder),
        "zero3, resumed": ranks(2, run, short(folder, "zero3", "gkd"), "zero3", True),
    }
    (folder / "codes.json").write_text(json.dumps(codes), encoding="utf-8")


def short(folder: Path, name: str, recipe: str, **student: Any) -> dict[str, Any]:
    """Steps of plain descent: Adam would turn the last digit of a gradient near zero into another weight."""
    train = {
        "max_steps": 3, "micro_batch_size": 1, "lr": 0.1, "hf": {"optim": "sgd"}, "log_every": 1,
        "save_every": 1, "validate_every": 2, "keep": "best", "best_by": "loss",
    }  # fmt: skip
    student = {"tokenizer": TEACHER, "from_config": WITHOUT_DROPOUT, **student}
    made = tree_of_recipe(folder, recipe, train=train, student=student)
    return {**made, "name": name, "output": {"folder": str(folder / name), "report": False}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("deepspeed")
    write_data(made, rows=12)
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(PACKAGE)])
    code = f"from tests.train.test_deepspeed_runs import *; all_runs(Path({str(made)!r}))"
    env = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, timeout=300)
    return made


def test_every_process_ends_as_it_should(folder: Path) -> None:
    codes = json.loads((folder / "codes.json").read_text())
    assert 0 not in codes.pop("zero3, killed")
    assert 0 not in codes.pop("zero3, in one")
    assert {code for found in codes.values() for code in found} == {0}


@pytest.mark.parametrize(("one", "sharded"), [("one-lora", "zero2"), ("one", "zero3")])
def test_losses_are_those_of_one_process(folder: Path, one: str, sharded: str) -> None:
    """Trained, validated and with gradients accumulated; gkd writes with weights that are gathered."""
    losses, expected = ([row["loss"] for row in rows_of(folder / name)] for name in (sharded, one))
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-7)


def test_the_first_process_saves_whole_weights(folder: Path) -> None:
    expected = load_file(folder / "one" / "student" / "model.safetensors")
    for saved in ("student", "checkpoints/checkpoint-3"):
        found = load_file(folder / "zero3" / saved / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_adapters_are_those_of_one_process(folder: Path) -> None:
    one, sharded = (
        load_file(folder / name / "student/adapter_model.safetensors") for name in ("one-lora", "zero2")
    )
    assert one.keys() == sharded.keys()
    assert any(weight.abs().sum() > 0 for name, weight in sharded.items() if "lora_B" in name)
    for name, weight in one.items():
        torch.testing.assert_close(sharded[name], weight, rtol=1e-5, atol=1e-7)


def test_another_number_of_processes_is_refused_with_both(folder: Path) -> None:
    said = (folder / "alone.err").read_text(encoding="utf-8")
    assert "2 processes wrote it under DeepSpeed ZeRO-3" in said
    assert "cannot deal them out to one process. Resume it in 2 processes" in said
    assert "damaged" not in said
