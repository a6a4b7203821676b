"""What a run would do: its values with their origin, and its size, before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse import console
from stillhouse.errors import ModelError
from stillhouse.fused.kernel import Chunking
from stillhouse.models.config import StudentConfig, TeacherModel
from stillhouse.runs.config import RunConfig
from stillhouse.runs.preflight import check_room, context_of, longest
from stillhouse.runs.resolve import Resolved
from stillhouse.teachers import CacheTeacherConfig
from stillhouse.teachers.store.codecs import RECORD_OVERHEAD

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model configuration says about size, without any weight in memory."""

    parameters: int
    layers: int
    width: int
    vocab: int
    bytes_each: int
    context: int | None
    """The most tokens that it can take; None if its configuration does not say."""


def show_values(resolved: Resolved) -> None:
    """Print every value and where it comes from; what the user or the recipe set comes first."""
    rows = [(path, _text(fact["value"]), fact["origin"]) for path, fact in resolved.provenance.items()]
    rows.sort(key=lambda row: row[2] == "default")
    console.print_table(("value", "is", "from"), rows)


def show_sizes(config: RunConfig) -> None:
    """Print tokens, steps, parameters and an estimate of the peak memory.

    Raises:
        StillhouseError: tokenizer, data or a model configuration cannot be read.
    """
    console.print_table(("quantity", "value"), list(sizes(config).items()))


def sizes(config: RunConfig) -> dict[str, Any]:
    """The size of a run, by name. Reads tokenizers, data and model configurations; loads no weights.

    Raises:
        StillhouseError: something cannot be read, or the longest sequence does not fit a model's context.
    """
    from stillhouse.data import load_data
    from stillhouse.runs.evaluation import check_tasks, held_out_prompts
    from stillhouse.runs.tokenizers import tokenizers, told

    teacher_config = config.teacher.model_to_load() if config.teacher is not None else None
    found = tokenizers(config)
    tokenizer = found.student
    needs = "responses" in config.responses.requirements().data
    data = load_data(config.data, tokenizer, needs_response=needs, teacher_tokenizer=found.teacher)
    questions = held_out_prompts(config, data, tokenizer)
    check_tasks(config, tokenizer)
    teacher = shape_of(teacher_config) if teacher_config is not None else None
    student = student_shape(config.student, teacher_config, len(tokenizer))
    contexts = {"student": student.context, "teacher": teacher.context if teacher else None}
    check_room(config, data.train, questions, contexts)
    per_epoch = -(-len(data.train) // config.train.batch_size)
    length = longest(config, data.train)
    facts: dict[str, Any] = {
        "prompts": len(data.train),
        "held-out prompts": len(questions),
        "prompt tokens": sum(len(p.token_ids) for p in data.train),
        "response tokens": sum(len(p.response_ids or ()) for p in data.train),
        "optimiser steps": config.train.max_steps or math.ceil(per_epoch * config.train.epochs),
        "optimiser steps in an epoch": per_epoch,
        "student parameters": student.parameters,
    }
    if teacher is not None:
        facts["teacher parameters"] = teacher.parameters
        facts["tokenizers"] = told(found, config, data)
    if isinstance(config.teacher, CacheTeacherConfig) and teacher is not None:
        facts["teacher cache, expected (GB)"] = float(f"{_cached(config, data, teacher) / 1e9:.2g}")
    facts["longest sequence (tokens)"] = length
    facts["peak memory, estimated (GB)"] = float(f"{peak(config, student, teacher, length) / 1e9:.2g}")
    return facts


def _cached(config: RunConfig, data: Any, teacher: Shape) -> float:
    """Bytes that the teacher's cache will take for the texts that are known, or at most as long as allowed.

    Text that the student writes anew at each step comes on top.
    """
    assert isinstance(config.teacher, CacheTeacherConfig)
    dtype = {4: "float32", 2: "bfloat16"}[teacher.bytes_each]
    codec = config.teacher.codec(teacher.vocab, dtype)
    tokens = 0
    for source in config.responses.sources():
        if source == "fixed":
            tokens += sum(len(prompt.response_ids or ()) for prompt in data.train)
        else:
            tokens += len(data.train) * config.data.max_response
    size = tokens * codec.row_bytes(teacher.width) + RECORD_OVERHEAD * len(data.train)
    head = teacher.vocab * teacher.width * teacher.bytes_each if config.teacher.store == "hidden" else 0
    return min(size, config.teacher.limit or size) + head


def peak(config: RunConfig, student: Shape, teacher: Shape | None, length: int) -> float:
    """An estimate of the bytes that a run needs at its widest point, the Python libraries apart.

    Weights, gradients and Adam's two moments; and the larger of a training step and of text being written. A
    step keeps about 28 numbers of the hidden width for each token and layer, or 2 and one layer's 56 with
    gradient checkpointing, and a chunk of logits; writing keeps keys and values. Measured on a CPU for Llamas
    of 7M to 52M parameters, the estimate was 0.8 to 1.1 times the truth.

    Args:
        config: the run.
        student: its size.
        teacher: its size, if there is one.
        length: tokens of the longest sequence.
    """
    lora = config.student.lora
    trained = student.parameters if lora is None else 14 * student.layers * student.width * lora.rank
    static = (student.parameters + 3 * trained) * student.bytes_each
    number = 2 if config.train.precision == "bfloat16" else student.bytes_each
    tokens = length * config.train.micro_batch_size * config.responses.sequences_per_prompt()
    each = 2 * student.layers + 56 if config.student.gradient_checkpointing else 28 * student.layers
    step = tokens * student.width * each * number
    step += min(Chunking().memory_budget, tokens * student.vocab * 4 * 4)
    if teacher is not None:
        static += teacher.parameters * teacher.bytes_each
        step += tokens * teacher.width * 28 * teacher.bytes_each
    writers = [model for model in (student, teacher) if model is not None]
    rows = getattr(config.engine, "batch_size", 1)
    cached = max(model.layers * 2 * model.width * model.bytes_each for model in writers)
    return static + max(step, rows * (length * cached + student.vocab * 12))


def shape_of(model: Any, layers: Sequence[int] | None = None) -> Shape:
    """The size of a model, or of these layers of it, read from its configuration alone."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from stillhouse.models.load import pruned_config
    from stillhouse.models.paths import resolve_path

    options = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    folder = resolve_path(model.path)
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
    return _shape(empty, found, model.dtype)


def student_shape(student: StudentConfig, teacher: TeacherModel | None, vocab: int) -> Shape:
    """The size of the student, however it starts."""
    if student.path is not None:
        return shape_of(student)
    if student.from_teacher is not None:
        if teacher is None:
            raise ModelError("student.from_teacher: there is no teacher model to start from.")
        kept = shape_of(teacher, student.from_teacher.layers)
        return replace(kept, bytes_each=BYTES.get(student.dtype, kept.bytes_each))
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from stillhouse.models.load import config_from_options

    found = config_from_options(student.from_config or {}, vocab)
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(found)
    return _shape(empty, found, student.dtype)


def _shape(model: Any, config: Any, dtype: str) -> Shape:
    model.tie_weights()  # emptying the weights has parted tied ones
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    name = stored if dtype == "auto" else dtype
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocab=text.vocab_size,
        bytes_each=BYTES.get(name, 4),
        context=context_of(config),
    )


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
