"""Whole runs under accelerate's FSDP2: as under DDP, also resumed, and saved whole by the first process.

accelerate leaves FSDP out on a CPU; `fsdp_on_cpu` turns that one switch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.children import ranks, write_to
from tests.small_runs import STUDENT, TEACHER, announce, nth, rows_of, tree_of_recipe, write_data
from tests.train import fsdp_on_cpu
from transformers import AutoModelForCausalLM

import stillhouse
from stillhouse.errors import ConfigError
from stillhouse.runs.checks import preflight
from stillhouse.runs.resolve import resolve


def run(
    tree: dict[str, Any], fsdp: bool, resume: bool = False, dies: bool = False, shards: bool = False
) -> None:
    if fsdp:
        kind = "SHARDED_STATE_DICT" if shards else "FULL_STATE_DICT"
        os.environ.update(fsdp_on_cpu.ASKED | {"FSDP_STATE_DICT_TYPE": kind})
        fsdp_on_cpu.switch_on()
    if dies:  # while the second checkpoint is sealed
        announce(nth(2, "os.rename", "complete.json"), 9)
    stillhouse.run(tree, resume=resume)


def resume_whole(tree: dict[str, Any], said: Path) -> None:
    """Resume under DDP, and leave what it says in a file for each process."""
    rank = os.environ["RANK"]
    write_to(said.with_suffix(f".{rank}.out"), said.with_suffix(f".{rank}.err"))
    run(tree, fsdp=False, resume=True)


def in_two(tree: dict[str, Any], **options: bool) -> list[int]:
    return ranks(2, run, tree, *(options.get(name, False) for name in ("fsdp", "resume", "dies", "shards")))


def short(folder: Path, name: str, recipe: str, **changes: Any) -> dict[str, Any]:
    train = {"max_steps": 3, "save_every": 1, "log_every": 1, "validate_every": 2, "keep": "best"}
    made = tree_of_recipe(folder, recipe, train={**train, "best_by": "loss"}, **changes)
    return {**made, "name": name, "output": {"folder": str(folder / name), "report": False}}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fsdp")
    write_data(made, rows=12)
    return made


def test_a_sharded_run_that_is_killed_and_resumed_is_that_of_whole_models(folder: Path) -> None:
    """On-policy, validated, with the best weights kept: all that reads the student beside the training."""
    assert in_two(short(folder, "ddp", "gkd")) == [0, 0]
    tree = short(folder, "fsdp", "gkd")
    assert 0 not in in_two(tree, fsdp=True, dies=True)
    assert in_two(tree, fsdp=True, resume=True) == [0, 0]
    torch.testing.assert_close(losses(folder / "fsdp"), losses(folder / "ddp"), rtol=1e-5, atol=1e-7)
    whole, gathered = (load_file(folder / name / "student" / "model.safetensors") for name in ("ddp", "fsdp"))
    assert gathered.keys() == whole.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(gathered[name], expected, rtol=1e-4, atol=1e-5)
    checkpoint = AutoModelForCausalLM.from_pretrained(folder / "fsdp/checkpoints/checkpoint-3").state_dict()
    torch.testing.assert_close(
        checkpoint["transformer.wte.weight"], gathered["transformer.wte.weight"], rtol=0.1, atol=0.01
    )


def test_adapters_are_saved_whole_beside_a_sharded_teacher(folder: Path) -> None:
    student = {"tokenizer": TEACHER, "from_config": STUDENT, "lora": {"rank": 2, "merge": False}}
    teacher = {"kind": "live", "path": TEACHER, "shard": "fsdp2"}
    assert in_two(short(folder, "lora", "kd", student=student, teacher=teacher), fsdp=True) == [0, 0]
    saved = folder / "lora" / "student"
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    adapted = PeftModel.from_pretrained(base, saved)
    assert any(weight.abs().sum() > 0 for name, weight in adapted.named_parameters() if "lora_B" in name)
    checkpoint = load_file(folder / "lora/checkpoints/checkpoint-3/adapter_model.safetensors")
    ours = load_file(saved / "adapter_model.safetensors")
    assert checkpoint.keys() == ours.keys()


def test_checkpoints_of_shards_resume_a_killed_run(folder: Path) -> None:
    """With adapters; the student is saved whole beside them."""
    student = {"tokenizer": TEACHER, "from_config": STUDENT, "lora": {"rank": 2, "merge": False}}
    assert in_two(short(folder, "straight", "kd", student=student), fsdp=True, shards=True) == [0, 0]
    tree = short(folder, "shards", "kd", student=student)
    assert 0 not in in_two(tree, fsdp=True, shards=True, dies=True)
    assert in_two(tree, fsdp=True, shards=True, resume=True) == [0, 0]
    assert losses(folder / "shards") == losses(folder / "straight")
    saved = (
        load_file(folder / name / "student/adapter_model.safetensors") for name in ("straight", "shards")
    )
    straight, resumed = saved
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())
    assert [*(folder / "shards/checkpoints/checkpoint-3").glob("*/*.distcp")]


def test_checkpoints_of_shards_go_on_in_more_processes_but_not_under_ddp(folder: Path) -> None:
    """Without dropout, which draws other numbers there; the weights are those of a run that stayed in two."""
    still = STUDENT | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    student = {"tokenizer": TEACHER, "from_config": still}
    trees = [short(folder, name, "kd", student=student) for name in ("stayed", "grown")]
    for tree in trees:
        tree["train"] |= {"micro_batch_size": 1, "lr": 0.1, "hf": {"optim": "sgd"}}
    stayed, grown = trees
    assert in_two(stayed, fsdp=True, shards=True) == [0, 0]
    assert 0 not in in_two(grown, fsdp=True, shards=True, dies=True)
    assert 0 not in ranks(2, resume_whole, grown, folder / "whole")
    said = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("whole.*.err")))
    assert "written under FSDP with SHARDED_STATE_DICT, and this run is under DDP" in said
    assert "damaged" not in said
    assert ranks(4, run, grown, True, True, False, True) == [0] * 4
    expected, found = (load_file(folder / name / "student/model.safetensors") for name in ("stayed", "grown"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


def test_what_a_sharded_teacher_cannot_do_is_refused(folder: Path) -> None:
    teacher = {"kind": "live", "path": TEACHER, "shard": "fsdp2"}
    tree = tree_of_recipe(folder, "kd", teacher=teacher, evaluate={"teacher": True})
    with pytest.raises(ConfigError, match=r"evaluate\.teacher.*Set it to false"):
        preflight(resolve(tree).config)
    with pytest.raises(ConfigError, match="text"):  # the teacher writes
        resolve(tree_of_recipe(folder, "seqkd", teacher=teacher))
    with pytest.raises(ConfigError, match=r"of\.shard"):
        resolve(tree_of_recipe(folder, "kd", teacher={"kind": "cache", "of": teacher}))


def test_a_teacher_made_of_the_sharded_student_is_refused(folder: Path) -> None:
    train = {"hf": {"fsdp": True, "fsdp_config": {"version": 2}}}
    tree = tree_of_recipe(folder, "kd", teacher={"kind": "student", "weights": "ema"}, train=train)
    with pytest.raises(ConfigError, match=r"teacher\.kind.*Train with whole weights: DDP, or ZeRO-2"):
        preflight(resolve(tree).config)
