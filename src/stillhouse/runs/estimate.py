"""The size of a run, before any weight is loaded: tokens, steps, parameters, memory, the teacher's cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from stillhouse.core.requirements import teacher_path
from stillhouse.core.types import Prompt
from stillhouse.data import Data, load_data
from stillhouse.errors import ModelError
from stillhouse.models.adapters import add_lora
from stillhouse.models.config import StudentConfig, TeacherModel
from stillhouse.models.from_config import config_from_options
from stillhouse.models.hidden import unwrap
from stillhouse.models.load import parameter_counts
from stillhouse.models.parts import freeze_tower
from stillhouse.models.paths import model_files
from stillhouse.models.pruning.plan import pruned_without_weights
from stillhouse.models.pruning.sizes import sizes_of
from stillhouse.models.quantise import bits_per_weight, quantisable_layers
from stillhouse.models.readers import auto_class, model_reader, student_reader
from stillhouse.models.vision import ImageReader
from stillhouse.runs.checks import check_context_lengths, context_length, longest_sequence
from stillhouse.runs.config import RunConfig
from stillhouse.runs.evaluation import check_tasks, held_out_prompts
from stillhouse.runs.memory import GpuSize, ModelSize, peak_memory
from stillhouse.runs.teacher_import import with_known_rows
from stillhouse.runs.tokenizers import describe, format_notes, tokenizers
from stillhouse.runs.towers import image_rows, tower_size

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PEAK_MEMORY = "peak memory, estimated (GB)"
"""The estimate's row with the memory of the process, or of the GPU where there is one."""


def this_gpu() -> GpuSize | None:
    """The GPU of this machine that a process takes by default; None if there is none."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return GpuSize(facts.name, facts.total_memory)


def estimate(config: RunConfig, gpu: GpuSize | None = None) -> dict[str, Any]:
    """The size of a run, by name. Reads tokenizers, data and model configurations; loads no weights.

    Args:
        config: the run.
        gpu: what it is to run on; default: the GPU of this machine, or its CPU.

    Raises:
        StillhouseError: something cannot be read, or the longest sequence does not fit a model's context.
    """
    teacher_model = config.teacher.model_to_load() if config.teacher is not None else None
    found = tokenizers(config)
    tokenizer = found.student
    data = load_data(config.data, tokenizer, needs=config.responses.requirements().data, teacher=found.reads)
    data = with_known_rows(config, data)
    prompts = held_out_prompts(config, data, tokenizer)
    check_tasks(config, tokenizer)
    seen = model_reader(teacher_model) if teacher_model is not None else None
    reader = student_reader(config.student, tokenizer, seen)
    student = student_size(config.student, teacher_model, len(tokenizer), reader, data.train)
    teachers = _teacher_sizes(config, data.train)
    teacher = teachers.get("teacher")
    contexts = {name: size.context for name, size in {"student": student, **teachers}.items()}
    check_context_lengths(config, data.train, prompts, contexts)
    steps_per_epoch = -(-len(data.train) // config.train.batch_size)
    length = longest_sequence(config, data.train)
    steps = config.train.max_steps or math.ceil(steps_per_epoch * config.train.epochs)
    generated = config.responses.generated_responses(len(data.train), steps, config.train.batch_size)
    rows: dict[str, Any] = {
        "prompts": len(data.train),
        "held-out prompts": len(prompts),
        **_formats(data),
        **_pairs(data),
        **_dropped(data),
        "prompt tokens": sum(len(p.token_ids) for p in data.train),
        "response tokens": sum(prompt.num_trained for prompt in data.train),
        **_turns(data),
        "optimiser steps": steps,
        "optimiser steps in an epoch": steps_per_epoch,
        **{f"responses to generate by the {model}, at most": count for model, count in generated.items()},
        **_student(config.student, student, teacher_model, len(tokenizer)),
    }
    rows |= {f"{name} parameters": size.parameters for name, size in teachers.items()}
    if teacher is not None:
        rows["tokenizers"] = describe(found, config, data)
    rows |= format_notes(found, data)
    rows |= _teacher_caches(config, data, teachers)
    rows |= image_rows(data.train, reader)
    rows["longest sequence (tokens)"] = length
    at_once = _generated_at_once(config, generated, len(data.train), len(prompts))
    gpu = gpu or this_gpu()
    held = (*teachers.values(), *_copies(config, student))
    memory = peak_memory(config, student, held, length, at_once, gpu)
    return rows | _memory_rows(memory, gpu)


def _teacher_sizes(config: RunConfig, prompts: Sequence[Prompt]) -> dict[str, ModelSize]:
    """Of each teacher that is loaded in this process, by its path."""
    return {
        teacher_path(name): model_size(model, prompts)
        for name, one in config.all_teachers.items()
        if (model := one.model_to_load()) is not None
    }


def _memory_rows(memory: float, gpu: GpuSize | None) -> dict[str, Any]:
    """The device and the memory that a run takes of it, and what to do where that is too much."""
    rows = {"device": "cpu" if gpu is None else gpu.name, PEAK_MEMORY: _gigabytes(memory)}
    if gpu is None:
        return rows
    rows["memory of the GPU (GB)"] = _gigabytes(gpu.memory)
    if memory > gpu.memory:
        rows["does not fit"] = (
            "lower train.micro_batch_size or engine.batch_size, or set student.gradient_checkpointing, "
            "student.lora or teacher.kind: cache"
        )
    return rows


def _copies(config: RunConfig, student: ModelSize) -> list[ModelSize]:
    """The copies that teachers keep of what is trained of the student; those that are alike keep one."""
    kept = {teacher for teacher in config.all_teachers.values() if teacher.copies_student}
    copied = student if student.trainable is None else replace(student, parameters=0)
    return [copied] * len(kept)


def _generated_at_once(config: RunConfig, generated: dict[str, int], prompts: int, held_out: int) -> int:
    """How many responses an engine in this process has in work at the same time, at most."""
    asked = max(min(max(generated.values(), default=0), prompts), held_out * len(config.evaluate.seeds))
    return min(asked, getattr(config.engine, "batch_size", 1))


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


def _dropped(data: Data) -> dict[str, str]:
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


def _teacher_caches(config: RunConfig, data: Data, teachers: Mapping[str, ModelSize]) -> dict[str, float]:
    """The expected size of each teacher's cache, of those that have one."""
    found = {}
    for name in config.all_teachers:
        size = teachers.get(teacher_path(name))
        if size is not None and (cached := teacher_cache_bytes(config, data, size, name)) is not None:
            found[f"{teacher_path(name)} cache, expected (GB)"] = _gigabytes(cached)
    return found


def teacher_cache_bytes(config: RunConfig, data: Data, teacher: ModelSize, name: str) -> int | None:
    """Bytes of a teacher's cache for the responses that are known, at their length or its limit.

    None if the teacher has no cache. Responses that the student generates anew at each step come on top.
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
    return config.all_teachers[name].cache_bytes(
        tokens, sequences, teacher.vocab, teacher.hidden_size, teacher.dtype_bytes
    )


def _response_tokens(prompt: Prompt, source: str, limit: int) -> int:
    """How many tokens of a response the cache holds: of the data set's as they are, else at most."""
    if source in ("fixed", "chosen"):
        return prompt.num_trained
    return len(prompt.rejected_ids or ()) if source == "rejected" else limit


def model_size(model: Any, prompts: Sequence[Prompt] = ()) -> ModelSize:
    """The size of a model from its configuration alone.

    Args:
        model: where it is.
        prompts: of the training, which may have images.

    Raises:
        ModelError: there is no causal language model.
    """
    empty = _without_weights(model)
    tower = tower_size(empty.requires_grad_(False), model_reader(model) if prompts else None, prompts)
    return replace(_size_of(empty, model.dtype), tower=tower)


def student_size(
    student: StudentConfig,
    teacher: TeacherModel | None,
    vocab: int,
    reader: ImageReader | None = None,
    prompts: Sequence[Prompt] = (),
) -> ModelSize:
    """The size of the student, however it is initialised, with its adapters.

    Args:
        student: how it is initialised.
        teacher: what it may start from.
        vocab: of its tokenizer.
        reader: what reads images for it.
        prompts: of the training, which may have images.
    """
    empty, dtype = empty_student(student, teacher, vocab)
    freeze_tower(empty, student)
    counts = parameter_counts(empty)
    size = replace(_size_of(empty, dtype), tower=tower_size(empty, reader, prompts))
    if counts["trainable"] < counts["parameters"]:
        size = replace(size, trainable=counts["trainable"])
    if (quantise := student.quantise) is not None:
        layers = quantisable_layers(empty, quantise, "student.quantise").values()
        quantised = sum(layer.weight.numel() for layer in layers)
        bits = None if quantise.qat else bits_per_weight(quantise)
        size = replace(size, quantised=quantised, quantised_bits=bits)
    if student.lora is None:
        return size
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        empty = add_lora(empty, student.lora)
        counts = parameter_counts(empty)
    tower = size.tower and tower_size(unwrap(empty), reader, prompts)
    return replace(size, trainable=counts["trainable"], adapter=counts["adapter"], tower=tower)


def empty_student(student: StudentConfig, teacher: TeacherModel | None, vocab: int) -> tuple[Any, str]:
    """The student with shapes and without weights, and the dtype that it is trained in."""
    if student.path is not None:
        return _without_weights(student), student.dtype
    if student.from_teacher is not None:
        if teacher is None:
            raise ModelError("student.from_teacher: there is no teacher model to start from.")
        dtype = teacher.dtype if student.dtype == "auto" else student.dtype
        return pruned_without_weights(student.from_teacher, _without_weights(teacher), vocab), dtype
    return _empty(config_from_options(student.from_config or {}, vocab)), student.dtype


def _student(
    student: StudentConfig, size: ModelSize, teacher: TeacherModel | None, vocab: int
) -> dict[str, Any]:
    """The parameters of the student, and its sizes and the teacher's where it starts from parts of that."""
    rows: dict[str, Any] = {"student parameters": size.parameters}
    if student.from_teacher is not None and teacher is not None:
        empty = _without_weights(teacher)
        smaller = pruned_without_weights(student.from_teacher, empty, vocab)
        found, whole = sizes_of(smaller.config), sizes_of(empty.config)
        which = "; which is measured when the run starts" if student.from_teacher.measures else ""
        rows["student's sizes"] = f"{found.told()}; the teacher's: {whole.told()}{which}"
    if size.trainable is not None:
        rows["trainable parameters"] = size.trainable
    return rows


def _without_weights(model: Any) -> Any:
    from transformers import AutoConfig

    options = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    folder = model_files(model.path).model
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code, **options)
        return _empty(found, trust_remote_code=model.trust_remote_code)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model.path}: no causal language model could be read from there. ({error})"
        ) from error


def _empty(config: Any, **options: Any) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, **options)
    model.tie_weights()  # init_empty_weights has untied them
    return model


def _size_of(model: Any, dtype: str) -> ModelSize:
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    heads = getattr(text, "num_attention_heads", None)
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else text.hidden_size)
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab=text.vocab_size,
        dtype_bytes=BYTES.get(stored if dtype == "auto" else dtype, 4),
        context=context_length(config),
        key_value_size=width * (getattr(text, "num_key_value_heads", None) or heads or 1),
    )
