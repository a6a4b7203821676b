"""The peak memory of a run, from the sizes of its models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.runs.config import RunConfig
from stillhouse.runs.towers import TowerSize

PROCESS = 0.6e9
"""Resident bytes of Python with torch, transformers, datasets and the trainer but no model, on a CPU."""
GPU_BLOCKS = 1.05
"""What torch takes of a GPU for the tensors that it holds: a little more, for blocks that do not fit."""
TEACHER_ROWS = 1024
"""Rows for which a GPU has a teacher's logits at a time."""


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
    key_value_size: int | None = None
    """Numbers in the keys of one token and layer; None: as many as `hidden_size`."""
    trainable: int | None = None
    """How many parameters are trained, those of adapters included; None: all."""
    adapter: int = 0
    """Parameters of LoRA adapters, which `parameters` leaves out."""
    quantised: int = 0
    """How many parameters are quantised, or rounded in the forward pass (QAT)."""
    quantised_bits: float | None = None
    """What a quantised parameter takes; None where a rounded copy is made in each pass."""

    tower: TowerSize | None = None
    """Of a vision-language model whose rows have images."""

    @property
    def key_value_bytes(self) -> int:
        """Of the keys and values of one token."""
        return self.layers * 2 * (self.key_value_size or self.hidden_size) * self.dtype_bytes

    @property
    def bytes(self) -> int:
        """Of the weights."""
        whole = (self.parameters + self.adapter) * self.dtype_bytes
        if self.quantised_bits is None:
            return whole
        return whole - int(self.quantised * (self.dtype_bytes - self.quantised_bits / 8))


@dataclass(frozen=True, slots=True)
class GpuSize:
    """A GPU as far as an estimate needs to know it, whether or not there is one.

    Example: `GpuSize("H100", 80 * 10**9)`
    """

    name: str
    memory: int
    """Bytes."""


def peak_memory(
    config: RunConfig,
    student: ModelSize,
    teachers: Sequence[ModelSize],
    length: int,
    generated_rows: int,
    gpu: GpuSize | None = None,
) -> float:
    """An estimate of a run's peak memory in bytes: of the whole process on a CPU, of the device on a GPU.

    The process, weights, gradients and Adam's two moments, plus the largest of a training step, generation
    and the merged copy of a student with adapters at export. A step keeps about 28 numbers of the hidden size
    for each token and layer, or 2 and one layer's 56 with gradient checkpointing, and a chunk of logits;
    generation keeps keys and values, on a GPU also between its calls. Quantised weights are dequantised a
    layer at a time. Vision towers keep what `TowerSize` says. docs/estimates.md compares it with measured
    runs.

    Args:
        config: the run.
        student: its size.
        teachers: the size of each teacher that is loaded in this process.
        length: tokens of the longest sequence.
        generated_rows: responses that are generated at the same time, at most.
        gpu: where models are; None: on a CPU.
    """
    trained = student.parameters if student.trainable is None else student.trainable
    static = student.bytes + 3 * trained * student.dtype_bytes + sum(teacher.bytes for teacher in teachers)
    mixed = config.train.precision == "bfloat16"
    if buffered := config.engine.kept_tokens(generated_rows, length, gpu is not None):
        static += buffered * student.key_value_bytes
        if mixed and student.dtype_bytes > 2:
            static += 2 * student.parameters  # the engine's copies of the weights that autocast casts
    tokens = _tokens_in_a_micro_batch(config, length)
    kept = 2 * student.layers + 56 if config.student.gradient_checkpointing else 28 * student.layers
    step: float = tokens * student.hidden_size * kept * (2 if mixed else student.dtype_bytes)
    step += sum(tokens * teacher.hidden_size * 28 * teacher.dtype_bytes for teacher in teachers)
    step += _images((student, *teachers), tokens / length)
    step += _logits(config, student, len(teachers), tokens, None if gpu is None else gpu.memory - static)
    if mixed and student.dtype_bytes > 2:
        step += 2 * student.parameters  # weights as they are cast for the products
    if student.quantised and student.quantised_bits is None:
        step += student.quantised * (student.dtype_bytes + 1)  # the rounded ones, and which were clipped
    key_values = max(model.key_value_bytes for model in (student, *teachers))
    generation = generated_rows * (length * key_values + student.vocab * 12)
    merged = student.bytes if student.adapter else 0
    most = static + max(step, generation, merged)
    return most + PROCESS if gpu is None else most * GPU_BLOCKS


def _images(models: Sequence[ModelSize], sequences: float) -> float:
    """Bytes of activations in vision towers, and of the further tokens that teachers read for images."""
    return sum(
        model.dtype_bytes
        * (model.tower.activations(sequences) + sequences * model.tower.more_tokens * model.hidden_size * 28)
        for model in models
        if model.tower is not None
    )


def _logits(config: RunConfig, student: ModelSize, teachers: int, tokens: int, free: float | None) -> float:
    """Bytes of a chunk of the loss over the head."""
    if free is None:
        return min(config.train.fused.budget(), tokens * student.vocab * 4 * 4)
    chunk = min(config.train.fused.budget(max(0, int(free))), tokens * student.vocab * 6)
    slab = min(tokens, TEACHER_ROWS) * student.vocab * 4 if teachers else 0
    head = student.vocab * student.hidden_size * 4 if student.trainable is None else 0
    return chunk + slab + head  # fp32 logits and bf16 gradient; the teacher's; the head's gradient in fp32


def _tokens_in_a_micro_batch(config: RunConfig, length: int) -> int:
    """At most, with padding; sequences that an objective compares are never split by a budget of tokens."""
    together: int = config.responses.sequences_per_prompt()
    budget = config.train.micro_batch_tokens
    if budget is None:
        return length * config.train.micro_batch_size * together
    paired = "pairs" in config.objective.requirements().rows
    return max(budget, length * (together if paired else 1))
