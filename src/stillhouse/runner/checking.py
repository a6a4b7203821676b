"""What a run would do: its values with their origin, and its size, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stillhouse import console
from stillhouse.errors import ModelError
from stillhouse.models.config import StudentConfig
from stillhouse.runner.resolve import Resolved
from stillhouse.settings import RunConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ADAM_BYTES = 8
"""Two fp32 moments for each trained parameter."""
CHUNK_BYTES = 256 << 20
"""What the chunked loss may hold of logits at a time."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model configuration says about size, without any weight in memory."""

    parameters: int
    layers: int
    width: int
    vocab: int
    bytes_each: int


def show_values(resolved: Resolved) -> None:
    """Print every value and where it comes from; what the user or the recipe set comes first."""
    rows = [(path, _text(fact["value"]), fact["origin"]) for path, fact in resolved.provenance.items()]
    rows.sort(key=lambda row: row[2] == "default")
    console.table(("value", "is", "from"), rows)


def show_sizes(config: RunConfig) -> None:
    """Print tokens, steps, parameters and an estimate of the peak memory.

    Raises:
        StillhouseError: tokenizer, data or a model configuration cannot be read.
    """
    console.table(("quantity", "value"), list(sizes(config).items()))


def sizes(config: RunConfig) -> dict[str, Any]:
    """The size of a run, by name. Reads tokenizers, data and model configurations; loads no weights.

    The memory is an estimate: weights, gradients, Adam's moments, activations kept for the backward pass
    (about 16 hidden-size numbers for each layer and token, 2 with gradient checkpointing) and the chunk of
    logits.
    """
    from stillhouse.data import load
    from stillhouse.models import check_same_tokenizer, load_tokenizer

    teacher_config = config.teacher.model() if config.teacher is not None else None
    tokenizer = load_tokenizer(config.student, teacher_config)
    if teacher_config is not None:
        check_same_tokenizer(tokenizer, load_tokenizer(teacher_config))
    data = load(config.data, tokenizer, needs_response=config.responses.needs_reference())
    teacher = shape_of(teacher_config) if teacher_config is not None else None
    student = student_shape(config.student, teacher, len(tokenizer))
    prompts = len(data.train)
    per_epoch = -(-prompts // config.train.batch_size)
    steps = config.train.max_steps or round(per_epoch * config.train.epochs)
    lengths = [len(p.token_ids) + len(p.response_ids or ()) for p in data.train]
    per_sequence = (
        max(lengths) if config.responses.needs_reference() else max(lengths) + config.data.max_response
    )
    facts: dict[str, Any] = {
        "prompts": prompts,
        "held-out prompts": len(data.valid),
        "prompt tokens": sum(len(p.token_ids) for p in data.train),
        "response tokens": sum(len(p.response_ids or ()) for p in data.train),
        "optimiser steps": steps,
        "optimiser steps in an epoch": per_epoch,
        "student parameters": student.parameters,
    }
    if teacher is not None:
        facts["teacher parameters"] = teacher.parameters
    sequences = config.train.micro_batch_size * config.responses.sequences_per_prompt()
    facts["longest sequence (tokens)"] = per_sequence
    facts["peak memory, estimated (GB)"] = round(
        peak(config, student, teacher, sequences * per_sequence) / 1e9, 2
    )
    return facts


def peak(config: RunConfig, student: Shape, teacher: Shape | None, tokens: int) -> float:
    """Bytes at the widest point of a training step with `tokens` tokens in a micro-batch."""
    lora = config.student.lora
    trained = student.parameters if lora is None else 14 * student.layers * student.width * lora.rank
    weights = student.parameters * student.bytes_each + trained * (student.bytes_each + ADAM_BYTES)
    kept = 2 if config.student.gradient_checkpointing else 16
    activations = (
        tokens * student.layers * student.width * kept * (2 if config.train.precision == "bfloat16" else 4)
    )
    held = 0 if teacher is None else teacher.parameters * teacher.bytes_each + tokens * teacher.width * 8
    return weights + activations + held + CHUNK_BYTES


def shape_of(model: Any) -> Shape:
    """The size of a model at a path, read from its configuration alone."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from stillhouse.models.load import place

    options = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    folder = place(model.path)
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code, **options)
        with init_empty_weights(include_buffers=False):
            empty = AutoModelForCausalLM.from_config(found, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model.path}: no causal language model could be read from there. ({error})"
        ) from error
    return _shape(empty, found, model.dtype)


def student_shape(student: StudentConfig, teacher: Shape | None, vocab: int) -> Shape:
    """The size of the student, however it starts."""
    if student.path is not None:
        return shape_of(student)
    if student.from_teacher is not None:
        if teacher is None:
            raise ModelError("student.from_teacher: there is no teacher model to start from.")
        embeddings = teacher.vocab * teacher.width
        each = (teacher.parameters - embeddings) / teacher.layers
        kept = len(student.from_teacher.layers)
        return Shape(
            int(embeddings + each * kept), kept, teacher.width, teacher.vocab, BYTES.get(student.dtype, 4)
        )
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from stillhouse.models.load import config_of

    found = config_of(student.from_config or {}, vocab)
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
    )


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
