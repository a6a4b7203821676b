"""What is asked for and not active is an error, in words; on this machine that is all of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests import tiny
from tests.children import ranks
from tests.train import fsdp_on_cpu
from transformers import TrainingArguments

from stillhouse.errors import EnvironmentFault
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig, FixedPolicy
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.parallelism import check_launcher
from stillhouse.train.step import Method, Step
from stillhouse.train.trainer import StepTrainer

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
GROUPS = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


def make(folder: Path, launcher: dict[str, str], hf: dict[str, Any]) -> None:
    os.environ.update(launcher)
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], remove_unused_columns=False, **hf)
    said = "trains"
    try:
        trainer_of(arguments)
    except EnvironmentFault as error:
        said = str(error)
    (folder / "said").write_text(said)
    if dist.is_initialized():
        dist.barrier()  # the others may still be making groups, through the first one


def trainer_of(arguments: TrainingArguments) -> StepTrainer:
    teachers = {"main": LiveTeacher(tiny.model(7), tiny.VOCAB)}
    step = Step(Method(FixedConfig(), build("forward_kl"), "token"), FixedPolicy(), teachers, 0, tiny.VOCAB)
    return StepTrainer(step=step, model=tiny.model(1), args=arguments, train_dataset=tiny.prompts(4))


@pytest.mark.parametrize(
    ("launcher", "hf", "words"),
    [
        (FSDP2, {}, "ACCELERATE_USE_FSDP asks for FSDP"),
        ({}, {"fsdp": True}, "train.hf.fsdp asks for FSDP, and this is a single process"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP of version 1 is asked for"),
        (FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading lets"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "mixed_precision: bf16, and train.precision of the run"),
        (GROUPS | {"ACCELERATE_USE_PARALLELISM_CONFIG": "1"}, {}, "it takes no other word than true"),
        (GROUPS | FSDP2, {}, "dp_shard_size: 1, and for FSDP, which would have nothing to shard over"),
        ({}, {}, "trains"),
    ],
)
def test_what_is_asked_for_and_not_active_is_refused(
    launcher: dict[str, str], hf: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert ranks(1, make, tmp_path, launcher, hf) == [0]
    assert words in (tmp_path / "said").read_text()


def sees_the_precision_of_sums(folder: Path) -> None:
    os.environ.update(fsdp_on_cpu.ASKED)
    fsdp_on_cpu.switch_on()
    trainer = trainer_of(TrainingArguments(str(folder), use_cpu=True, report_to=[], bf16=True))
    policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_fsdp2_adds_gradients_up_in_fp32(tmp_path: Path) -> None:
    """accelerate would, with mixed precision, over micro-batches and processes in bf16."""
    assert ranks(2, sees_the_precision_of_sums, tmp_path) == [0, 0]


def test_deepspeed_without_its_package_or_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed, by the want of a launcher: it would look for MPI."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    refusal = r"(not installed\. Install it with: pip install 'stillhouse\[deepspeed\]'|Start it with)"
    with pytest.raises(EnvironmentFault, match=rf"train\.hf\.deepspeed asks for DeepSpeed.*{refusal}"):
        check_launcher({"deepspeed": {"zero_optimization": {"stage": 2}}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(EnvironmentFault, match=rf"ACCELERATE_USE_DEEPSPEED asks for DeepSpeed.*{refusal}"):
        check_launcher({})


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"TP_SIZE": "2"}, "tp_size: 2, which is tensor parallelism"),
        ({"CP_SIZE": "4"}, "context parallelism"),
        ({"SP_SIZE": "2"}, "sequence parallelism"),
        ({"DP_SHARD_SIZE": "two"}, "PARALLELISM_CONFIG_DP_SHARD_SIZE is 'two'"),
        ({"DP_REPLICATE_SIZE": "4"}, "16 processes, and 8 were started. Set dp_replicate_size: 2"),
        ({"DP_SHARD_SIZE": "3"}, "6 processes, and 8 were started. Set sizes that do"),
        ({"DP_REPLICATE_SIZE": "8", "DP_SHARD_SIZE": "1"}, "FSDP, which would have nothing to shard over"),
    ],
)
def test_groups_that_are_not_data_parallel_over_all_processes_are_refused(
    sizes: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = {**GROUPS, **FSDP2, "WORLD_SIZE": "8", **in_groups(DP_REPLICATE_SIZE="2", DP_SHARD_SIZE="4")}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    check_launcher({})
    for name, value in in_groups(**sizes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=words):
        check_launcher({})
    with pytest.raises(EnvironmentFault, match=r"train\.hf\.parallelism_config cannot be given"):
        check_launcher({"parallelism_config": {"tp_size": 2}})


def in_groups(**sizes: str) -> dict[str, str]:
    return {f"PARALLELISM_CONFIG_{name}": size for name, size in sizes.items()}


def test_groups_that_nothing_shards_over_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would make the groups and train by DDP."""
    for name, value in {**GROUPS, "WORLD_SIZE": "8", **in_groups(DP_SHARD_SIZE="8")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=r"and not for FSDP.*each process would hold the whole model"):
        check_launcher({})


def test_hybrid_sharding_where_accelerate_has_no_fsdp_is_refused_in_words(tmp_path: Path) -> None:
    launcher = {**GROUPS, **FSDP2, **in_groups(DP_REPLICATE_SIZE="2", DP_SHARD_SIZE="2")}
    assert ranks(4, make, tmp_path, launcher, {}) == [0] * 4
    assert (
        "accelerate does not run the sizes of its parallelism_config here" in (tmp_path / "said").read_text()
    )
