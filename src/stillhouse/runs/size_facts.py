"""The size of a run, of a stage or of a reward model's training in plain values under names that stay:
what `check --json` prints, and what `check` says first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from stillhouse.engines.base import EngineConfig, Sampling
from stillhouse.evaluate import EvaluateConfig
from stillhouse.runs.config import RunConfig
from stillhouse.runs.memory import ALONE, Devices, GpuSize, MemoryParts, most_memory

EVALUATION = "evaluation"
"""Who writes, where responses are for evaluation."""
REMEDY = (
    "lower train.micro_batch_size or engine.batch_size, or set student.gradient_checkpointing, student.lora "
    "or teacher.kind: cache"
)
"""What a run does that has to do with less memory."""
REWARD_REMEDY = "lower micro_batch_size or data.max_response, or start from a smaller model"
"""The same of a reward model's training."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Writing:
    """What a model has to generate, at most.

    Example: `Writing(responses=64, tokens=8192)`
    """

    responses: int
    tokens: int
    """If every response is as long as it may be."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run's memory is estimated for.

    Example: `Machine(GpuSize("H100", 80 * 10**9), Devices(8, "fsdp2"))`
    """

    gpu: GpuSize | None = None
    """None: the GPU of this machine, or its CPU."""
    devices: Devices = ALONE
    online: bool = True
    """Whether the servers that a run names can be reached from here, and are asked."""


HERE = Machine()
"""One process on this machine."""


def writings(config: RunConfig, prompts: int, steps: int, held_out: int) -> dict[str, Writing]:
    """What there is to generate, at most, by "teacher", "student" and "evaluation".

    Args:
        config: the run.
        prompts: to train on.
        steps: optimiser steps.
        held_out: prompts of the evaluation.
    """
    generated = config.responses.generated_responses(prompts, steps, config.train.batch_size)
    found = {}
    for model, count in generated.items():
        sampling = config.responses.sampling_of(model)
        if sampling is None and model == "student":
            sampling = getattr(config.responses, "sampling", None)
        found[model] = Writing(count, count * max_tokens(config, config.engine, sampling))
    systems = 1 + config.evaluate.before + (config.evaluate.teacher and config.teacher is not None)
    if evaluated := systems * held_out * len(config.evaluate.seeds):
        found[EVALUATION] = Writing(evaluated, evaluated * max_tokens(config, config.evaluate))
    return found


def max_tokens(
    config: RunConfig, settings: EngineConfig | EvaluateConfig, own: Sampling | None = None
) -> int:
    """The most tokens of a response: what its sampling says, or else data.max_response."""
    sampling = own or settings.sampling
    if "max_tokens" in sampling.model_fields_set:
        return int(sampling.max_tokens)
    return int(config.data.max_response)


def memory_facts(
    memory: Mapping[str, MemoryParts], gpu: GpuSize | None, devices: Devices = ALONE
) -> dict[str, Any]:
    """Device, memory by phase and part, and whether it fits."""
    peak, there = most_memory(memory), memory_of_machine() if gpu is None else gpu.memory
    return {
        "device": {
            "name": "cpu" if gpu is None else gpu.name,
            "memory_bytes": there,
            "count": devices.count,
            "parallel": devices.parallel if devices.count > 1 else None,
            **({"shard_size": devices.shard_size} if devices.shard_size else {}),
        },
        "memory_bytes": {
            "peak": round(peak),
            "phases": {
                phase: {name: round(size) for name, size in parts.items()} for phase, parts in memory.items()
            },
        },
        "fits": peak <= there,
    }


def writing_facts(found: Mapping[str, Writing]) -> dict[str, dict[str, int]]:
    """As plain values."""
    return {name: {"responses": one.responses, "tokens": one.tokens} for name, one in found.items()}


def memory_of_machine() -> int:
    """Bytes of main memory, or what this process's group may take of it."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = CGROUP_LIMIT.read_text(encoding="utf-8").strip()
    except OSError:  # no Linux, or no groups of the second version
        return total
    return min(total, int(limit)) if limit.isdigit() else total
