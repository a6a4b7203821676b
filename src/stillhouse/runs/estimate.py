"""The size of a run, before any weight is loaded: tokens, steps, parameters, memory, the teacher's cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.core.requirements import teacher_path
from stillhouse.data import Data, load_data
from stillhouse.errors import ModelError
from stillhouse.models.config import StudentConfig, TeacherModel
from stillhouse.models.load import config_from_options, pruned_config
from stillhouse.models.paths import model_files
from stillhouse.runs.checks import check_context_lengths, context_length, longest_sequence
from stillhouse.runs.config import RunConfig
from stillhouse.runs.evaluation import check_tasks, held_out_prompts
from stillhouse.runs.tokenizers import describe, tokenizers

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model's configuration says about its size.

    Example: `ModelSize(134_515_008, layers=30, hidden_size=576, vocab=49_152, dtype_bytes=2, context=8192)`
    """

    parameters: int
    layers: int
    hidden_size: int
    vocab: int
    dtype_bytes: int
    context: int | None
    """The most tokens that it takes; None if its configuration does not say."""


def estimate(config: RunConfig) -> dict[str, Any]:
    """The size of a run, by name. Reads tokenizers, data and model configurations; loads no weights.

    Raises:
        StillhouseError: something cannot be read, or the longest sequence does not fit a model's context.
    """
    teacher_model = config.teacher.model_to_load() if config.teacher is not None else None
    found = tokenizers(config)
    tokenizer = found.student
    needs_response = "responses" in config.responses.requirements().data
    data = load_data(config.data, tokenizer, needs_response=needs_response, teacher_tokenizer=found.teacher)
    prompts = held_out_prompts(config, data, tokenizer)
    check_tasks(config, tokenizer)
    student = student_size(config.student, teacher_model, len(tokenizer))
    teachers = {
        teacher_path(name): model_size(model)
        for name, one in config.all_teachers.items()
        if (model := one.model_to_load()) is not None
    }
    teacher = teachers.get("teacher")
    contexts = {name: size.context for name, size in {"student": student, **teachers}.items()}
    check_context_lengths(config, data.train, prompts, contexts)
    steps_per_epoch = -(-len(data.train) // config.train.batch_size)
    length = longest_sequence(config, data.train)
    rows: dict[str, Any] = {
        "prompts": len(data.train),
        "held-out prompts": len(prompts),
        **_dropped(data),
        "prompt tokens": sum(len(p.token_ids) for p in data.train),
        "response tokens": sum(len(p.response_ids or ()) for p in data.train),
        "optimiser steps": config.train.max_steps or math.ceil(steps_per_epoch * config.train.epochs),
        "optimiser steps in an epoch": steps_per_epoch,
        "student parameters": student.parameters,
    }
    rows |= {f"{name} parameters": size.parameters for name, size in teachers.items()}
    if teacher is not None:
        rows["tokenizers"] = describe(found, config, data)
    if teacher is not None and (cached := teacher_cache_bytes(config, data, teacher)) is not None:
        rows["teacher cache, expected (GB)"] = _gigabytes(cached)
    rows["longest sequence (tokens)"] = length
    rows["peak memory, estimated (GB)"] = _gigabytes(
        peak_memory(config, student, tuple(teachers.values()), length)
    )
    return rows


def _dropped(data: Data) -> dict[str, str]:
    """How many rows of each set take no part or were cut, and why; nothing where none was."""
    found = {}
    for one in data.report.get("sets", ()):
        for what in ("dropped", "truncated"):
            reasons = ", ".join(f"{count:,} x {why}" for why, count in one.get(what, {}).items() if count)
            if reasons:
                found[f"{one['name']}: {what}, of {one['rows']:,} rows"] = reasons
    return found


def _gigabytes(size: float) -> float:
    """To two digits."""
    return float(f"{size / 1e9:.2g}")


def teacher_cache_bytes(config: RunConfig, data: Data, teacher: ModelSize) -> int | None:
    """Bytes of the teacher's cache for the responses that are known, at their length or its limit.

    None if the teacher has no cache. Responses that the student generates anew at each step come on top.
    """
    tokens = 0
    for source in config.responses.sources():
        if source == "fixed":
            tokens += sum(len(prompt.response_ids or ()) for prompt in data.train)
        else:
            tokens += len(data.train) * config.data.max_response
    assert config.teacher is not None
    return config.teacher.cache_bytes(
        tokens, len(data.train), teacher.vocab, teacher.hidden_size, teacher.dtype_bytes
    )


def peak_memory(config: RunConfig, student: ModelSize, teachers: Sequence[ModelSize], length: int) -> float:
    """An estimate of a run's peak memory in bytes, without the Python libraries.

    Weights, gradients and Adam's two moments, plus the larger of a training step and of generation. A step
    keeps about 28 numbers of the hidden size for each token and layer, or 2 and one layer's 56 with gradient
    checkpointing, and a chunk of logits; generation keeps keys and values. Measured on a CPU for Llamas of
    7M to 52M parameters, the estimate was 0.8 to 1.1 times the truth.

    Args:
        config: the run.
        student: its size.
        teachers: the size of each teacher that is loaded in this process.
        length: tokens of the longest sequence.
    """
    lora = config.student.lora
    trained = student.parameters if lora is None else 14 * student.layers * student.hidden_size * lora.rank
    static = (student.parameters + 3 * trained) * student.dtype_bytes
    activation_bytes = 2 if config.train.precision == "bfloat16" else student.dtype_bytes
    tokens = length * config.train.micro_batch_size * config.responses.sequences_per_prompt()
    kept = 2 * student.layers + 56 if config.student.gradient_checkpointing else 28 * student.layers
    step = tokens * student.hidden_size * kept * activation_bytes
    step += min(config.train.fused.memory_budget, tokens * student.vocab * 4 * 4)
    for teacher in teachers:
        static += teacher.parameters * teacher.dtype_bytes
        step += tokens * teacher.hidden_size * 28 * teacher.dtype_bytes
    key_values = max(
        model.layers * 2 * model.hidden_size * model.dtype_bytes for model in (student, *teachers)
    )
    generation = getattr(config.engine, "batch_size", 1) * (length * key_values + student.vocab * 12)
    return static + max(step, generation)


def model_size(model: Any, layers: Sequence[int] | None = None) -> ModelSize:
    """The size of a model, or of a model of some of its layers, from its configuration alone.

    Raises:
        ModelError: there is no causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    folder = model_files(model.path).model
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code, **options)
        if layers is not None:
            found = pruned_config(found, layers)
        with init_empty_weights(include_buffers=False):
            empty = AutoModelForCausalLM.from_config(found, trust_remote_code=model.trust_remote_code)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model.path}: no causal language model could be read from there. ({error})"
        ) from error
    return _size_of(empty, found, model.dtype)


def student_size(student: StudentConfig, teacher: TeacherModel | None, vocab: int) -> ModelSize:
    """The size of the student, however it is initialised."""
    if student.path is not None:
        return model_size(student)
    if student.from_teacher is not None:
        if teacher is None:
            raise ModelError("student.from_teacher: there is no teacher model to start from.")
        kept = model_size(teacher, student.from_teacher.layers)
        return replace(kept, dtype_bytes=BYTES.get(student.dtype, kept.dtype_bytes))
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    found = config_from_options(student.from_config or {}, vocab)
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(found)
    return _size_of(empty, found, student.dtype)


def _size_of(model: Any, config: Any, dtype: str) -> ModelSize:
    model.tie_weights()  # init_empty_weights has untied them
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab=text.vocab_size,
        dtype_bytes=BYTES.get(stored if dtype == "auto" else dtype, 4),
        context=context_length(config),
    )
