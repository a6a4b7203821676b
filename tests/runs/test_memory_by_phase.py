"""The memory of a run by phase and part, on one device and on one of several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from stillhouse.core.sharding import SHARDED, Parallelism
from stillhouse.runs.estimate import estimate
from stillhouse.runs.memory import Devices, GpuSize, MemoryParts, Workload, memory_by_phase, most_memory
from stillhouse.runs.model_sizes import ModelSize
from stillhouse.runs.resolve import resolve
from tests.workshop import Workshop

STUDENT = ModelSize(8 * 10**9, layers=32, hidden_size=4096, vocab=128_256, dtype_bytes=4, context=8192)
TEACHER = ModelSize(70 * 10**9, layers=80, hidden_size=8192, vocab=128_256, dtype_bytes=2, context=8192)
CARD = GpuSize("a GPU of 80GB", 80 * 10**9)


def phases(parallel: Parallelism, count: int = 8, generated: int = 0) -> dict[str, MemoryParts]:
    config = resolve("run.yaml", {"train.precision": "bfloat16"}).config
    work, devices = Workload(512, generated), Devices(count, parallel)
    return memory_by_phase(config, STUDENT, (TEACHER,), work, CARD, devices)


@pytest.mark.parametrize("parallel", SHARDED)
def test_each_parallelism_cuts_what_it_cuts(workshop: Workshop, parallel: Parallelism) -> None:
    alone, shared = phases("ddp", 1)["optimiser"], phases(parallel)["optimiser"]
    cut = SHARDED[parallel]
    assert shared["student weights"] * (8 if "weights" in cut else 1) == pytest.approx(
        alone["student weights"]
    )
    assert shared["gradients"] * (8 if "gradients" in cut else 1) == pytest.approx(alone["gradients"])
    assert shared["optimiser states"] * (8 if "optimizer" in cut else 1) == pytest.approx(
        alone["optimiser states"]
    )
    assert shared["teacher weights"] == alone["teacher weights"]


def test_a_sharded_teacher_counts_as_a_share_with_what_is_gathered_of_it(workshop: Workshop) -> None:
    config, work = resolve("run.yaml").config, Workload(512)

    def of_the_teacher(count: int) -> float:
        teacher = replace(TEACHER, sharded=True)
        parts = memory_by_phase(config, STUDENT, (teacher,), work, CARD, Devices(count, "fsdp2"))["optimiser"]
        return sum(size for name, size in parts.items() if "teacher" in name)

    alone = phases("ddp", 1)["optimiser"]["teacher weights"]
    assert of_the_teacher(1) == alone
    assert alone / 8 < of_the_teacher(8) < alone / 4


def test_hybrid_sharding_divides_by_the_shards_of_a_replica(workshop: Workshop) -> None:
    config, work, teacher = resolve("run.yaml").config, Workload(512, 8), replace(TEACHER, sharded=True)
    hybrid, sharded = (
        memory_by_phase(config, STUDENT, (teacher,), work, CARD, devices)
        for devices in (Devices(64, "hsdp", 8), Devices(8, "fsdp2"))
    )
    assert hybrid == sharded


def test_fsdp2_has_whole_gradients_while_a_step_has_several_micro_batches(workshop: Workshop) -> None:
    """Unless each shards its own; DeepSpeed does so anyway."""
    each = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}

    def of_a_step(parallel: Parallelism, **train: Any) -> MemoryParts:
        given = {f"train.{name}": value for name, value in train.items()}
        config = resolve("run.yaml", {"train.precision": "bfloat16", **given}).config
        devices = Devices(8, parallel, 4 if parallel == "hsdp" else None)
        parts = memory_by_phase(config, STUDENT, (), Workload(512), CARD, devices)
        return parts["student forward and backward"]

    name, one = "whole gradients of earlier micro-batches", {"batch_size": 8, "micro_batch_size": 1}
    for parallel in ("fsdp2", "hsdp"):
        assert of_a_step(parallel, **one | {"batch_size": 16})[name] == pytest.approx(1.05 * 4 * 8e9)
        assert name not in of_a_step(parallel, **one)
        assert name not in of_a_step(parallel, **one | {"batch_size": 16, "hf": each})
    assert name not in of_a_step("zero3", **one | {"batch_size": 16})


def test_the_more_is_cut_the_less_a_device_holds(workshop: Workshop) -> None:
    ddp, zero2, zero3 = (most_memory(phases(name)) for name in ("ddp", "zero2", "zero3"))
    assert ddp > zero2 > zero3
    assert most_memory(phases("fsdp2", 64)) < zero3
    assert ddp > most_memory(phases("ddp", 1)), "the buckets of gradients that are reduced"


def test_sharded_weights_are_whole_for_a_while(workshop: Workshop) -> None:
    step = phases("fsdp2")["student forward and backward"]
    head = 2 * STUDENT.vocab * STUDENT.hidden_size
    assert head < step["gathered weights"] < 2 * STUDENT.parameters
    assert "gathered weights" not in phases("zero2")["student forward and backward"]
    assert phases("fsdp2", generated=8)["generation"]["gathered weights"] >= STUDENT.bytes


def test_a_phase_holds_what_it_needs_and_no_more(workshop: Workshop) -> None:
    found = phases("ddp", 1, generated=64)
    assert list(found) == [
        "loading", "generation", "teacher forward", "student forward and backward", "optimiser",
        "evaluation", "checkpoint", "export",
    ]  # fmt: skip
    assert {"student weights", "teacher weights"} <= set.intersection(*map(set, found.values()))
    assert "gradients" not in found["generation"], "they are freed before the next step generates"
    assert found["generation"]["keys and values"] > 0
    assert "optimiser states" not in found["export"]
    assert "generation" not in phases("ddp", 1)


def test_check_prints_the_phases_of_one_device_of_several(workshop: Workshop) -> None:
    plain = workshop.stillhouse("check", "run.yaml", "--no-values").out
    assert "student forward and backward" in plain
    assert "devices" not in plain
    said = workshop.stillhouse(
        "check", "run.yaml", "--no-values", "--devices", "2", "--parallel", "fsdp2", "--gpu-memory", "24GB"
    ).out
    assert "2, fsdp2; memory is that of each" in said
    assert "gathered weights" in said
    asked = ("--devices", "4", "--parallel", "hsdp", "--shard-size", "2", "--gpu-memory", "24GB")
    said = workshop.stillhouse("check", "run.yaml", "train.micro_batch_size=1", "--no-values", *asked).out
    assert "4, hsdp over 2; memory is that of each" in said
    assert "on each of 4 (hsdp over 2)" in said


def test_check_refuses_processes_that_cannot_be(workshop: Workshop) -> None:
    refused = workshop.refused("check", "run.yaml", "--devices", "2", "--parallel", "fsdp")
    assert "--parallel: is no parallelism that is known; got fsdp; allowed: ddp" in refused
    refused = workshop.refused("check", "run.yaml", "--parallel", "zero2")
    assert "--parallel: has no effect for one process" in refused
    refused = workshop.refused("check", "run.yaml", "--devices", "8", "--parallel", "hsdp")
    assert "--parallel: needs a --shard-size; got hsdp" in refused
    refused = workshop.refused("check", "run.yaml", "--devices", "8", "--shard-size", "4")
    assert "--shard-size: has no effect; got 4" in refused
    for size in ("3", "8", "16"):
        refused = workshop.refused(
            "check", "run.yaml", "--devices", "8", "--parallel", "hsdp", "--shard-size", size
        )
        assert "does not divide 8 devices into two replicas or more" in refused
        assert "allowed: 2, 4" in refused
    refused = workshop.refused("check", "run.yaml", "--devices", "3")
    assert "train.batch_size: must be a multiple of train.micro_batch_size times" in refused


def test_check_counts_the_tokens_to_write(workshop: Workshop) -> None:
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text(encoding="utf-8"))
    found = estimate(resolve({**tree, "recipe": "imitkd"}, {"train.max_steps": 3}).config)
    assert found["tokens to write by the student, at most"] == 3 * 4 * 8
    assert found["tokens to write for evaluation, at most"] == 4 * 8, "neither the teacher nor the untrained"
