"""The size of a run, before any weight is loaded: tokens, steps, parameters, memory, the teacher's cache."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stillhouse.core.requirements import teacher_path
from stillhouse.core.types import Prompt
from stillhouse.data import Data, load_data
from stillhouse.models.config import StudentConfig, TeacherModel
from stillhouse.models.pruning.plan import pruned_without_weights
from stillhouse.models.pruning.sizes import sizes_of
from stillhouse.models.readers import model_reader, student_reader
from stillhouse.runs.checks import check_context_lengths, longest_sequence
from stillhouse.runs.config import RunConfig
from stillhouse.runs.evaluation import check_tasks, held_out_prompts
from stillhouse.runs.memory import (
    ALONE,
    Devices,
    GpuSize,
    MemoryParts,
    Workload,
    memory_by_phase,
    most_memory,
)
from stillhouse.runs.model_sizes import ModelSize, model_size, student_size, without_weights
from stillhouse.runs.size_facts import EVALUATION, Writing, memory_facts, writing_facts, writings
from stillhouse.runs.teacher_import import with_known_rows
from stillhouse.runs.tokenizers import describe, format_notes, tokenizers
from stillhouse.runs.towers import image_rows

COUNTED = {
    "prompts": "prompts",
    "held-out prompts": "held_out_prompts",
    "prompt tokens": "prompt_tokens",
    "response tokens": "response_tokens",
    "optimiser steps": "steps",
    "optimiser steps in an epoch": "steps_in_an_epoch",
    "longest sequence (tokens)": "longest_sequence",
}
"""Rows of a run's size that are plain counts, and what programs read them as."""
PEAK_MEMORY = "peak memory, estimated (GB)"
"""The estimate's row with the memory of the process, or of the GPU where there is one."""


def this_gpu() -> GpuSize | None:
    """The GPU of this machine that a process takes by default; None if there is none."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return GpuSize(facts.name, facts.total_memory)


@dataclass(frozen=True, slots=True)
class DataPace:
    """How the training data of a run compares with the first rows of it, which `check --measure` trains on.

    Example: `DataPace(reading=1.2, longer=1.05, response=24.5)`
    """

    reading: float
    """Seconds that it took to read and tokenise all data."""
    longer: float
    """Mean length of its prompts and responses, over that of the first rows."""
    response: float | None
    """Mean length of its responses in tokens; None where it has none."""


@dataclass(frozen=True, slots=True)
class RunSize:
    """What `check` says of a run before it begins.

    Example: `RunSize({"prompts": 3101, ...}, {"loading": {"student weights": 6.6e5}, ...}, ...)`
    """

    rows: dict[str, Any]
    """Tokens, steps, parameters, the teacher's cache, peak memory, by name."""
    memory: dict[str, MemoryParts]
    """Bytes on one device by phase and part; see `memory_by_phase`."""
    facts: dict[str, Any]
    """The same for programs; docs/estimates.md has the names."""
    writes: dict[str, Writing]
    """By "teacher", "student" and "evaluation"."""
    pace: DataPace
    student: ModelSize
    held: tuple[ModelSize, ...]
    """The teachers that are loaded in this process, and copies of the student."""
    work: Workload


@dataclass(frozen=True, slots=True)
class StageSize:
    """What `check` says of a stage of a chain, or of a reward model's training.

    Example: `StageSize({"prompts": 3101}, {"prompts": 3101, "tokens_to_write": {...}})`
    """

    rows: dict[str, Any]
    """For people, by name."""
    facts: dict[str, Any]
    """For programs; docs/estimates.md has the names."""
    run: RunSize | None = None
    """Of a stage that trains."""


def estimate(config: RunConfig, gpu: GpuSize | None = None) -> dict[str, Any]:
    """The rows of `run_size`, for one process."""
    return run_size(config, gpu).rows


def run_size(
    config: RunConfig, gpu: GpuSize | None = None, devices: Devices = ALONE, online: bool = True
) -> RunSize:
    """The size of a run. Reads tokenizers, data and model configurations; loads no weights.

    Args:
        config: the run.
        gpu: what it is to run on; default: the GPU of this machine, or its CPU.
        devices: the processes that train together.
        online: whether servers that hold teachers are asked whether these fit.

    Raises:
        StillhouseError: something cannot be read, a server does not answer, or the longest sequence does
            not fit a model's context.
    """
    teacher_model = config.teacher.model_to_load() if config.teacher is not None else None
    found = tokenizers(config, online)
    tokenizer = found.student
    began = time.perf_counter()
    data = load_data(config.data, tokenizer, needs=config.responses.requirements().data, teacher=found.reads)
    data = with_known_rows(config, data)
    prompts = held_out_prompts(config, data, tokenizer)
    reading = time.perf_counter() - began
    check_tasks(config, tokenizer)
    seen = model_reader(teacher_model) if teacher_model is not None else None
    reader = student_reader(config.student, tokenizer, seen)
    student = student_size(config.student, teacher_model, len(tokenizer), reader, data.train)
    teachers = _teacher_sizes(config, data.train)
    contexts = {name: size.context for name, size in {"student": student, **teachers}.items()}
    check_context_lengths(config, data.train, prompts, contexts)
    writes = writings(config, len(data.train), _steps(config, len(data.train))[1], len(prompts))
    rows: dict[str, Any] = {
        **_data_rows(data, len(prompts)),
        **_work(config, len(data.train), writes),
        **_student(config.student, student, teacher_model, len(tokenizer)),
    }
    rows |= {f"{name} parameters": size.parameters for name, size in teachers.items()}
    if "teacher" in teachers:
        rows["tokenizers"] = describe(found, config, data)
    rows |= format_notes(found, data)
    heads = _remote_heads(config) if online else {}
    rows |= {} if online else _not_asked(config)
    caches = _teacher_caches(config, data, teachers, heads)
    rows |= {f"{path} cache, expected (GB)": _gigabytes(size) for path, size in caches.items()}
    rows |= image_rows(data.train, reader)
    work = workload(config, data, len(prompts))
    rows["longest sequence (tokens)"] = work.length
    gpu = gpu or this_gpu()
    held = (*teachers.values(), *_copies(config, student))
    fetched = float(sum(math.prod(head) for head in heads.values()))
    memory = memory_by_phase(config, student, held, work, gpu, devices, fetched)
    rows |= _memory_rows(most_memory(memory), gpu, devices)
    facts = {
        **_facts(rows, {"student": student, **teachers}),
        "tokens_to_write": writing_facts(writes),
        "cache_bytes": caches,
        **memory_facts(memory, gpu, devices),
    }
    pace = DataPace(reading, _longer(data.train, config.train.batch_size), _mean_response(data.train))
    return RunSize(rows, memory, facts, writes, pace, student, held, work)


def _data_rows(data: Data, held_out: int) -> dict[str, Any]:
    """What the data holds, and what of it takes no part."""
    return {
        "prompts": len(data.train),
        "held-out prompts": held_out,
        **_formats(data),
        **_pairs(data),
        **dropped_rows(data),
        "prompt tokens": sum(len(p.token_ids) for p in data.train),
        "response tokens": sum(prompt.num_trained for prompt in data.train),
        **_turns(data),
    }


def _facts(rows: Mapping[str, Any], sizes: Mapping[str, ModelSize]) -> dict[str, Any]:
    """The counts and the models of a run for programs.

    Args:
        rows: of the run's size.
        sizes: of each model by name, the student among them.
    """
    student = sizes["student"]
    return {
        **{name: rows[row] for row, name in COUNTED.items()},
        "parameters": {name: size.parameters for name, size in sizes.items()},
        "trainable_parameters": student.parameters if student.trainable is None else student.trainable,
    }


def _longer(prompts: Sequence[Prompt], batch_size: int) -> float:
    """The mean length of all prompts with their responses, over that of those of the first two steps."""

    def mean(some: Sequence[Prompt]) -> float:
        lengths = [len(p.token_ids) + len(p.response_ids or ()) + len(p.rejected_ids or ()) for p in some]
        return sum(lengths) / len(lengths)

    return mean(prompts) / mean(prompts[: 2 * batch_size])


def _mean_response(prompts: Sequence[Prompt]) -> float | None:
    """Tokens of a response of the data in the mean; None where it has none."""
    lengths = [len(prompt.response_ids) for prompt in prompts if prompt.response_ids]
    return sum(lengths) / len(lengths) if lengths else None


def peak_of_steps(config: RunConfig, size: RunSize, tokens: int, gpu: GpuSize | None = None) -> float:
    """The estimated peak in bytes of a part of a run, whose largest micro-batch has so many tokens."""
    work = replace(size.work, tokens=tokens)
    return most_memory(memory_by_phase(config, size.student, size.held, work, gpu or this_gpu()))


def _steps(config: RunConfig, prompts: int) -> tuple[int, int]:
    """Optimiser steps in an epoch, and in all."""
    per_epoch = -(-prompts // config.train.batch_size)
    return per_epoch, config.train.max_steps or math.ceil(per_epoch * config.train.epochs)


def _work(config: RunConfig, prompts: int, writes: Mapping[str, Writing]) -> dict[str, int]:
    """Steps, and what there is to generate, at most: every response as long as it may be."""
    per_epoch, steps = _steps(config, prompts)
    rows = {"optimiser steps": steps, "optimiser steps in an epoch": per_epoch}
    for model, one in writes.items():
        if model == EVALUATION:
            rows["tokens to write for evaluation, at most"] = one.tokens
        else:
            rows[f"responses to generate by the {model}, at most"] = one.responses
            rows[f"tokens to write by the {model}, at most"] = one.tokens
    return rows


def workload(config: RunConfig, data: Data, held_out: int) -> Workload:
    """What one process has in work at the same time."""
    prompts = len(data.train)
    _, steps = _steps(config, prompts)
    generated = config.responses.generated_responses(prompts, steps, config.train.batch_size)
    most = getattr(config.engine, "batch_size", 1)
    return Workload(
        longest_sequence(config, data.train),
        generated=min(most, max(generated.values(), default=0), prompts),
        evaluated=min(most, held_out * len(config.evaluate.seeds)),
    )


def _teacher_sizes(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, ModelSize]:
    """Of each teacher that is loaded in this process, by its path."""
    return {
        teacher_path(name): replace(model_size(model, prompts), sharded=one.sharded)
        for name, one in config.all_teachers.items()
        if (model := one.model_to_load()) is not None
    }


def _remote_heads(config: RunConfig) -> dict[str, tuple[int, int, int]]:
    """Rows, width and bytes of a number of each head that is fetched from a server, by its teacher's path."""
    found = {teacher_path(name): one.remote_head() for name, one in config.all_teachers.items()}
    return {path: head for path, head in found.items() if head is not None}


def _not_asked(config: RunConfig) -> dict[str, str]:
    """What is not known of teachers whose servers were not asked."""
    return {
        f"{teacher_path(name)}: not asked": (
            f"{', '.join(one.addresses)}; whether its tokenizer is the student's, the memory of its head and "
            "the size of its cache are unknown"
        )
        for name, one in config.all_teachers.items()
        if one.addresses
    }


def _memory_rows(memory: float, gpu: GpuSize | None, devices: Devices) -> dict[str, Any]:
    """The device and the memory that a run takes of it."""
    rows: dict[str, Any] = {"device": "cpu" if gpu is None else gpu.name}
    if devices.count > 1:
        over = f" over {devices.shard_size}" if devices.shard_size else ""
        rows["devices"] = f"{devices.count}, {devices.parallel}{over}; memory is that of each"
    rows[PEAK_MEMORY] = _gigabytes(memory)
    if gpu is not None:
        rows["memory of the GPU (GB)"] = _gigabytes(gpu.memory)
    return rows


def _copies(config: RunConfig, student: ModelSize) -> list[ModelSize]:
    """The copies that teachers keep of what is trained of the student; those that are alike keep one."""
    kept = {teacher for teacher in config.all_teachers.values() if teacher.copies_student}
    copied = student if student.trainable is None else replace(student, parameters=0)
    return [copied] * len(kept)


def _formats(data: Data) -> dict[str, str]:
    """What the rows of each set are read as, and by which fields that was told."""
    return {
        f"{one['name']}: rows read as": ", ".join(
            f"{name} ({found['rows']:,}, by {', '.join(found['fields'])})"
            for name, found in one["formats"].items()
        )
        for one in data.report.get("sets", ())
        if one.get("formats")
    }


def _pairs(data: Data) -> dict[str, str]:
    """Of preference pairs: which of their responses the training uses."""
    train = data.report["sets"][0]
    if not train.get("pairs"):
        return {}
    used = (
        "the chosen and the rejected response" if "rejected_tokens" in train else "the chosen response only"
    )
    return {"train: preference pairs": f"{train['pairs']:,} of {train['kept']:,} rows; used: {used}"}


def dropped_rows(data: Data) -> dict[str, str]:
    """How many rows of each set take no part or were cut, and why; nothing where none was."""
    found = {}
    for one in data.report.get("sets", ()):
        for what in ("dropped", "truncated"):
            reasons = ", ".join(f"{count:,} x {why}" for why, count in one.get(what, {}).items() if count)
            if reasons:
                found[f"{one['name']}: {what}, of {one['rows']:,} rows"] = reasons
    return found


def _turns(data: Data) -> dict[str, int]:
    """How many turns of the assistant are trained on and how many only read, where there are such."""
    turns = data.report["sets"][0]["turns"]
    if not turns.get("context") and turns.get("trained on", 0) <= len(data.train):
        return {}
    return {f"assistant turns, {name}": turns.get(name, 0) for name in ("trained on", "context")}


def _gigabytes(size: float) -> float:
    """To two digits."""
    return float(f"{size / 1e9:.2g}")


def _teacher_caches(
    config: RunConfig,
    data: Data,
    teachers: Mapping[str, ModelSize],
    remote: Mapping[str, tuple[int, int, int]],
) -> dict[str, int]:
    """The expected bytes of each teacher's cache, of those that have one, by its path."""
    heads = {path: (size.vocab, size.hidden_size, size.dtype_bytes) for path, size in teachers.items()}
    heads |= remote
    found = {
        teacher_path(name): teacher_cache_bytes(config, data, heads[teacher_path(name)], name)
        for name in config.all_teachers
        if teacher_path(name) in heads
    }
    return {path: size for path, size in found.items() if size is not None}


def teacher_cache_bytes(config: RunConfig, data: Data, head: tuple[int, int, int], name: str) -> int | None:
    """Bytes of a teacher's cache for the responses that are known, at their length or its limit.

    None if the teacher has no cache. Responses that the student generates anew at each step come on top.

    Args:
        config: the run.
        data: its prompts.
        head: rows, width and bytes of a number of the teacher's head.
        name: of the teacher.
    """
    tokens, sequences = 0, 0
    for prompt in data.train:
        needed = [
            source
            for source in config.responses.sources()
            if name in config.objective.teachers_of(source, prompt.facts.get("teacher"))
        ]
        tokens += sum(_response_tokens(prompt, one, config.data.max_response) for one in needed)
        sequences += bool(needed)
    return config.all_teachers[name].cache_bytes(tokens, sequences, *head)


def _response_tokens(prompt: Prompt, source: str, limit: int) -> int:
    """How many tokens of a response the cache holds: of the data set's as they are, else at most."""
    if source in ("fixed", "chosen"):
        return prompt.num_trained
    return len(prompt.rejected_ids or ()) if source == "rejected" else limit


def _student(
    student: StudentConfig, size: ModelSize, teacher: TeacherModel | None, vocab: int
) -> dict[str, Any]:
    """The parameters of the student, and its sizes and the teacher's where it starts from parts of that."""
    rows: dict[str, Any] = {"student parameters": size.parameters}
    if student.from_teacher is not None and teacher is not None:
        empty = without_weights(teacher)
        smaller = pruned_without_weights(student.from_teacher, empty, vocab)
        found, whole = sizes_of(smaller.config), sizes_of(empty.config)
        which = "; which parts stay is measured when the run starts" if student.from_teacher.measures else ""
        rows["student's sizes"] = f"{found.describe()}; the teacher's: {whole.describe()}{which}"
    if size.trainable is not None:
        rows["trainable parameters"] = size.trainable
    return rows
