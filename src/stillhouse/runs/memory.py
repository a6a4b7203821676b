"""The memory of a run by phase and by part, from the sizes of its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillhouse.core.sharding import ADDED_UP_WHOLE, Parallelism, Part, share
from stillhouse.runs.config import RunConfig
from stillhouse.runs.model_sizes import ModelSize

PROCESS = 0.65e9
"""Resident bytes of Python with torch, transformers, datasets and the trainer but no model, on a CPU."""
GPU_BLOCKS = 1.05
"""What torch takes of a GPU for the tensors that it holds: a little more, for blocks that do not fit."""
TEACHER_ROWS = 1024
"""Rows for which a GPU has a teacher's logits at a time."""
KEPT_BY_A_LAYER = 28
"""Numbers of the hidden size that a layer keeps of each token for the backward pass, or needs while it runs
without one."""
FREED_BUT_KEPT = 0.5
"""Of what a step on a CPU allocates and frees, the share that malloc has kept when a step needs most, under
adapters. Where the weights are trained, gradients make up for it, which are counted together with the
activations that they replace."""

MemoryParts = dict[str, float]
"""Bytes by what holds them: weights, activations and so on."""


@dataclass(frozen=True, slots=True)
class GpuSize:
    """A GPU as far as an estimate needs to know it, whether or not there is one.

    Example: `GpuSize("H100", 80 * 10**9)`
    """

    name: str
    memory: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Devices:
    """How many processes train together, one on each device, and what they share.

    Example: `Devices(8, "fsdp2")`
    """

    count: int = 1
    parallel: Parallelism = "ddp"
    shard_size: int | None = None
    """Over how many of them weights are sharded, as each of several replicas is (HSDP); None: over all."""

    @property
    def shares_weights(self) -> bool:
        """Whether each of several processes holds a part of the weights only."""
        return self.share("weights") < 1

    def share(self, part: Part) -> float:
        """The share of a part of the student's memory that is on one device."""
        return share(self.parallel, part, self.sharing)

    @property
    def sharing(self) -> int:
        """How many processes hold a model together whose weights are sharded."""
        return self.shard_size or self.count


ALONE = Devices()
"""One process."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What one process has in work at the same time.

    Example: `Workload(length=512, generated=64, evaluated=32)`
    """

    length: int
    """Tokens of the longest sequence."""
    generated: int = 0
    """Responses that a training step generates at the same time, at most."""
    evaluated: int = 0
    """Responses that are generated for evaluation at the same time, at most."""
    tokens: int | None = None
    """Of the largest micro-batch, with padding; None: as many as the longest sequence allows."""


def most_memory(phases: Mapping[str, MemoryParts]) -> float:
    """The bytes of the phase that takes most."""
    return max(sum(parts.values()) for parts in phases.values())


def memory_by_phase(
    config: RunConfig,
    student: ModelSize,
    teachers: Sequence[ModelSize],
    work: Workload,
    gpu: GpuSize | None = None,
    devices: Devices = ALONE,
    heads: float = 0.0,
) -> dict[str, MemoryParts]:
    """An estimate of the bytes that each phase of a run takes on one device, by part: of the whole process on
    a CPU, of the device on a GPU.

    Gradients are there from the first backward pass of a step to the end of the step, under FSDP2 whole
    until the last one, Adam's two moments from the first step on. A step keeps about 28 numbers of the
    hidden size for each token and layer, or 2 and one layer's 56 with gradient checkpointing, a chunk of
    logits and the head's gradient before it is added; generation keeps keys and values, on a GPU also
    between its calls. Quantised weights are dequantised a layer at a time. Vision towers keep what
    `TowerSize` says. Of sharded weights two layers are whole at a time in a step, the one that runs and
    the one that is fetched, and the head; all of them while the student writes or is evaluated.
    docs/estimates.md compares it with measured runs.

    Args:
        config: the run.
        student: its size.
        teachers: the size of each teacher that is loaded in this process.
        work: what it has in work at the same time.
        gpu: where models are; None: on a CPU.
        devices: the processes that train together.
        heads: bytes of the heads of teachers that are elsewhere and send their hidden states.
    """
    held = _held(config, student, teachers, work, gpu, devices)
    held |= {"heads of teachers elsewhere": heads} if heads else {}
    optimiser, gradients = _trained(student, devices)
    tokens = work.tokens or _tokens_in_a_micro_batch(config, work.length)
    evaluated = min(work.evaluated, config.evaluate.batch_size) * work.length
    during = held | optimiser | gradients
    before = _gradients_of_earlier(config, student, devices)
    read = {"teacher activations": _read(teachers, tokens) + _images(teachers, tokens / work.length)}
    beside: MemoryParts = {} if gpu is None else read  # a GPU runs teachers beside the student
    free = None if gpu is None else gpu.memory - sum(during.values())
    step = _student_step(config, student, tokens, work.length)
    step |= {"logits": _logits(config, student, bool(teachers or heads), tokens, free)}
    if _casts(config, student, devices):
        step["weights cast for the products"] = 2.0 * student.parameters
    step |= {"freed, kept by malloc": 0.0 if gpu is not None else _kept_by_malloc(student, step)}
    writing = held | _whole(student, devices)
    found = {
        "loading": held,
        "generation": writing | optimiser | _written(student, teachers, work.length, work.generated),
        "teacher forward": during | before | read,
        "student forward and backward": during | before | beside | step | _gathered(config, student, devices),
        "optimiser": during,
        "evaluation": writing
        | {"activations": _read((student, *teachers), evaluated)}
        | _written(student, teachers, work.length, work.evaluated),
        "checkpoint": held | optimiser,
        "export": held | ({"merged copy": float(student.bytes)} if student.adapter else {}),
    }
    left_out = {"generation": not work.generated, "teacher forward": not teachers}
    return _of_device({phase: parts for phase, parts in found.items() if not left_out.get(phase)}, gpu)


def memory_of_writing(
    name: str, model: ModelSize, length: int, rows: int, buffered: int, gpu: GpuSize | None = None
) -> dict[str, MemoryParts]:
    """As `memory_by_phase`, of a process that only writes responses with one model.

    Args:
        name: of the model.
        model: its size.
        length: tokens of the longest prompt and response.
        rows: responses that are written at the same time.
        buffered: tokens that the engine keeps buffers of keys and values for.
        gpu: where the model is; None: on a CPU.
    """
    held: MemoryParts = {
        "process": PROCESS if gpu is None else 0.0,
        f"{name} weights": float(model.bytes),
        "buffers of keys and values": float(buffered * model.key_value_bytes),
    }
    return _of_device({"loading": held, "generation": held | _written(model, (), length, rows)}, gpu)


def memory_of_reward(model: ModelSize, tokens: int, gpu: GpuSize | None = None) -> dict[str, MemoryParts]:
    """As `memory_by_phase`, of the training of a reward model, which has a head of one number.

    Args:
        model: the size of its body.
        tokens: of the largest micro-batch, both responses of each pair and padding included.
        gpu: where the model is; None: on a CPU.
    """
    optimiser, gradients = _trained(model, ALONE)
    held: MemoryParts = {"process": PROCESS if gpu is None else 0.0, "weights": float(model.bytes)}
    during = held | optimiser | gradients
    kept = float(tokens * model.hidden_size * KEPT_BY_A_LAYER * model.layers * model.dtype_bytes)
    found: dict[str, MemoryParts] = {
        "loading": held,
        "forward and backward": during | {"activations": kept},
        "optimiser": during,
        "checkpoint": held | optimiser,
    }
    return _of_device(found, gpu)


def _of_device(phases: Mapping[str, MemoryParts], gpu: GpuSize | None) -> dict[str, MemoryParts]:
    """What the device has to hold for these tensors, without what is nothing."""
    blocks = 1.0 if gpu is None else GPU_BLOCKS
    return {
        phase: {name: size * blocks for name, size in parts.items() if size}
        for phase, parts in phases.items()
    }


def _trained(student: ModelSize, devices: Devices) -> tuple[MemoryParts, MemoryParts]:
    """Adam's two moments; and gradients."""
    trained = (student.parameters if student.trainable is None else student.trainable) * student.dtype_bytes
    optimiser = {"optimiser states": 2 * trained * devices.share("optimizer")}
    gradients = {"gradients": trained * devices.share("gradients")}
    if devices.count > 1 and devices.share("gradients") == 1:
        gradients["buckets of gradients"] = float(trained)  # DistributedDataParallel reduces copies of them
    return optimiser, gradients


def _gradients_of_earlier(config: RunConfig, student: ModelSize, devices: Devices) -> MemoryParts:
    """Those of a step's micro-batches but the last, where they are not sharded before it."""
    train = config.train
    several = train.batch_size > train.micro_batch_size * devices.count
    options = (train.hf.get("accelerator_config") or {}).get("gradient_accumulation_kwargs") or {}
    if devices.parallel not in ADDED_UP_WHOLE or options.get("sync_each_batch"):
        return {}
    if not several and train.micro_batch_tokens is None:
        return {}
    trained = student.parameters if student.trainable is None else student.trainable
    size = 4 if train.precision == "bfloat16" else student.dtype_bytes
    return {"whole gradients of earlier micro-batches": float(trained * size)}


def _held(
    config: RunConfig,
    student: ModelSize,
    teachers: Sequence[ModelSize],
    work: Workload,
    gpu: GpuSize | None,
    devices: Devices,
) -> MemoryParts:
    """What is there from the beginning to the end."""
    parts = {
        "process": PROCESS if gpu is None else 0.0,
        "student weights": student.bytes * devices.share("weights"),
    }
    for name in ("teacher weights", "gathered weights of the teacher"):
        parts[name] = sum(_weights(teacher, devices).get(name, 0.0) for teacher in teachers)
    rows = max(work.generated, work.evaluated)
    if buffered := config.engine.kept_tokens(rows, work.length, gpu is not None):
        parts["buffers of keys and values"] = float(buffered * student.key_value_bytes)
        if _casts(config, student, devices):
            parts["weights cast for generation"] = 2.0 * student.parameters
    return parts


def _weights(teacher: ModelSize, devices: Devices) -> MemoryParts:
    if teacher.sharded and devices.count > 1:
        return sharded_teacher(teacher, devices.sharing)
    return {"teacher weights": float(teacher.bytes)}


def sharded_teacher(teacher: ModelSize, processes: int) -> MemoryParts:
    """Of a teacher whose weights are sharded: its share, and two layers and the head whole."""
    head = teacher.vocab * teacher.hidden_size * teacher.dtype_bytes
    layer = max(0.0, teacher.bytes - 2 * head) / max(1, teacher.layers)
    return {
        "teacher weights": teacher.bytes / processes,
        "gathered weights of the teacher": 2 * layer + head,
    }


def _casts(config: RunConfig, student: ModelSize, devices: Devices) -> bool:
    """Whether mixed precision keeps rounded copies of the weights; sharded ones are rounded when gathered."""
    return config.train.precision == "bfloat16" and student.dtype_bytes > 2 and not devices.shares_weights


def _gathered(config: RunConfig, student: ModelSize, devices: Devices) -> MemoryParts:
    """What is whole of sharded weights in a step, and of their gradients."""
    if not devices.shares_weights:
        return {}
    head = student.vocab * student.hidden_size
    layer = max(0, student.parameters - head) / max(1, student.layers)
    size = 2 if config.train.precision == "bfloat16" else student.dtype_bytes
    return {"gathered weights": size * (3 * layer + 2 * head)}  # two layers and a gradient; the head and its


def _whole(student: ModelSize, devices: Devices) -> MemoryParts:
    """All sharded weights where the student writes, in their own precision."""
    return {"gathered weights": float(student.bytes)} if devices.shares_weights else {}


def _student_step(config: RunConfig, student: ModelSize, tokens: int, length: int) -> MemoryParts:
    """What the student's forward pass keeps for its backward pass."""
    size = 2 if config.train.precision == "bfloat16" else student.dtype_bytes
    layers = KEPT_BY_A_LAYER * student.layers
    kept = 2 * (student.layers + KEPT_BY_A_LAYER) if config.student.gradient_checkpointing else layers
    parts = {"activations": tokens * student.hidden_size * kept * size + _images((student,), tokens / length)}
    if student.quantised and student.quantised_bits is None:  # the rounded ones, and which were clipped
        parts["rounded weights"] = float(student.quantised * (student.dtype_bytes + 1))
    return parts


def _kept_by_malloc(student: ModelSize, step: MemoryParts) -> float:
    """Bytes that a step on a CPU has freed and the process still has; dequantised weights among them."""
    if not student.adapter:
        return 0.0
    whole = student.quantised * student.dtype_bytes if student.quantised_bits is not None else 0
    return FREED_BUT_KEPT * sum(step.values()) + whole


def _read(models: Sequence[ModelSize], tokens: int) -> float:
    """Bytes of activations of models that read without gradients, a layer at a time."""
    return sum(tokens * model.hidden_size * KEPT_BY_A_LAYER * model.dtype_bytes for model in models)


def _written(student: ModelSize, teachers: Sequence[ModelSize], length: int, rows: int) -> MemoryParts:
    """What generation keeps for so many responses at the same time."""
    key_values = max(model.key_value_bytes for model in (student, *teachers))
    return {
        "keys and values": float(rows * length * key_values),
        "next-token logits": float(rows * student.vocab * 12),
    }


def _images(models: Sequence[ModelSize], sequences: float) -> float:
    """Bytes of activations in vision towers, and of the further tokens that teachers read for images."""
    return sum(
        model.dtype_bytes
        * (
            model.tower.activations(sequences)
            + sequences * model.tower.more_tokens * model.hidden_size * KEPT_BY_A_LAYER
        )
        for model in models
        if model.tower is not None
    )


def _logits(config: RunConfig, student: ModelSize, teachers: bool, tokens: int, free: float | None) -> float:
    """Bytes of a chunk of the loss over the head."""
    head = student.vocab * student.hidden_size * 4 if student.trainable is None else 0
    if free is None:
        return min(config.train.fused.budget(), tokens * student.vocab * 4 * 4) + head
    chunk = min(config.train.fused.budget(max(0, int(free))), tokens * student.vocab * 6)
    slab = min(tokens, TEACHER_ROWS) * student.vocab * 4 if teachers else 0
    return chunk + slab + head  # fp32 logits and bf16 gradient; the teacher's; the head's gradient in fp32


def _tokens_in_a_micro_batch(config: RunConfig, length: int) -> int:
    """At most, with padding; sequences that an objective compares are never split by a budget of tokens."""
    together: int = config.responses.sequences_per_prompt()
    budget = config.train.micro_batch_tokens
    if budget is None:
        return length * config.train.micro_batch_size * together
    paired = "pairs" in config.objective.requirements().rows
    return max(budget, length * (together if paired else 1))
