"""Whole runs under accelerate's hybrid sharding, two replicas of two shards: as in one process, also resumed.

accelerate leaves FSDP out on a CPU; `fsdp_on_cpu` turns that one switch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.children import ranks
from tests.small_runs import STUDENT, TEACHER, announce, nth, rows_of, tree_of_recipe, write_data
from tests.train import fsdp_on_cpu
from torch.distributed.checkpoint import FileSystemReader

import stillhouse

WITHOUT_DROPOUT = STUDENT | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def short(folder: Path, name: str) -> dict[str, Any]:
    """Steps of plain descent on text of the student, over two micro-batches in each of four processes."""
    train = {
        "max_steps": 3, "batch_size": 8, "micro_batch_size": 1, "lr": 0.1, "hf": {"optim": "sgd"},
        "log_every": 1, "save_every": 1, "validate_every": 2, "keep": "best", "best_by": "loss",
    }  # fmt: skip
    student = {"tokenizer": TEACHER, "from_config": WITHOUT_DROPOUT}
    teacher = {"kind": "live", "path": TEACHER, "shard": "fsdp2"}
    made = tree_of_recipe(folder, "gkd", train=train, student=student, teacher=teacher)
    return {**made, "name": name, "output": {"folder": str(folder / name), "report": False}}


def run(trees: list[dict[str, Any]], hybrid: bool, resume: bool = False, last_dies: bool = False) -> None:
    """One after the other, with checkpoints of shards."""
    groups = fsdp_on_cpu.GROUPS if hybrid else {}
    os.environ.update({**fsdp_on_cpu.ASKED, **groups, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"})
    fsdp_on_cpu.switch_on()
    for tree in trees:
        if last_dies and tree is trees[-1]:  # while the second checkpoint is sealed
            announce(nth(2, "os.rename", "complete.json"), 9)
        stillhouse.run(tree, resume=resume)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def check_is_that_of_one_process(found: Path, alone: Path) -> None:
    torch.testing.assert_close(losses(found), losses(alone), rtol=1e-5, atol=1e-7)
    for name, weight in weights(alone).items():
        torch.testing.assert_close(weights(found)[name], weight, rtol=0, atol=1e-5)


def check_shards_are_written_once(checkpoint: Path) -> None:
    """Each weight in the two parts that a replica has of it, and on the disk no second time."""
    folder = checkpoint / "pytorch_model_fsdp_0"
    kept = FileSystemReader(folder).read_metadata()
    assert {len(weight.chunks) for weight in kept.state_dict_metadata.values()} == {2}
    on_disk = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    assert on_disk == sum(part.length for part in kept.storage_data.values())


def test_a_hybrid_run_is_that_of_one_process_and_goes_on_in_either_layout(tmp_path: Path) -> None:
    """Killed, it is resumed by FSDP2 over two processes, and, from the same checkpoint, as it was begun."""
    write_data(tmp_path, rows=24)
    alone, straight, killed = (tmp_path / name for name in ("alone", "straight", "killed"))
    trees = {folder: short(tmp_path, folder.name) for folder in (alone, straight, killed)}
    stillhouse.run(trees[alone])
    assert 0 not in ranks(4, run, [trees[straight], trees[killed]], True, False, True)
    check_is_that_of_one_process(straight, alone)
    check_shards_are_written_once(straight / "checkpoints" / "checkpoint-3")

    shutil.copytree(killed, before := tmp_path / "before")
    assert ranks(2, run, [trees[killed]], False, True) == [0, 0]
    check_is_that_of_one_process(killed, alone)

    shutil.rmtree(killed)
    before.rename(killed)
    assert ranks(4, run, [trees[killed]], True, True) == [0] * 4
    assert losses(killed) == losses(straight)
    assert all(torch.equal(weights(killed)[name], weight) for name, weight in weights(straight).items())
