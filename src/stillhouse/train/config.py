"""What a configuration may say about training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stillhouse.config import ListOf, StrictConfig, because
from stillhouse.fused import FusedConfig
from stillhouse.models import PackingMode

Every = Literal["epoch", "never"] | int
"""At the end of each epoch, never, or every so many optimiser steps."""
EveryShare = Every | float
"""As `Every`; a number with a point below 1 is a share of an epoch: 0.1 is ten times an epoch."""

MICRO_BATCH = 8
"""Prompts in one forward pass, where nothing is said and batches can be divided by it."""


class TrainConfig(StrictConfig):
    """How the student is optimised. What else Hugging Face's TrainingArguments know goes into `hf`."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the prompts."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; if given, it decides instead of `epochs`."""
    batch_size: int = Field(32, ge=1)
    """Prompts in one optimiser step, over all processes."""
    micro_batch_size: int = Field(MICRO_BATCH, ge=1)
    """Prompts in one forward pass on one process; changes memory and speed, not the gradient. Default: the
    largest of 1 to 8 that divides `batch_size`."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Instead of `micro_batch_size`: tokens in one forward pass on one process, with prompts and padding, in
    as many passes as that takes; a longer sequence goes alone. Changes memory and speed, not the gradient."""
    packing: PackingMode = "auto"
    """Whether models read sequences one after the other instead of padded to the longest: auto (where a
    variable-length attention kernel runs: on a GPU, in bfloat16), on (wherever a model has the same hidden
    states then) or off. Changes speed and rounding, not the loss."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled decay; none on biases and norms."""
    clip: float = Field(1.0, ge=0)
    """Greatest norm of the gradient; 0 switches clipping off."""
    seed: int = Field(42, ge=0)
    """Decides random weights, order of prompts, dropout, every draw and every sampled text."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs matrix products under autocast; weights keep their own dtype. The head's take part on a
    GPU, which keeps their results in fp32; a CPU would round the logits, so there they stay as they are."""
    compile_models: bool = False
    """Run the layers of student and teachers through torch.compile, in training and wherever whole sequences
    are read: faster on a GPU after the first steps, which take up to minutes longer. Changes rounding."""
    normalise: Literal["token", "sequence"] = "token"
    """The mean that the loss is: over all response tokens of the step, or over sequences of the mean over
    each one's tokens."""
    log_every: int = Field(10, ge=1)
    """Optimiser steps between two rows of metrics.jsonl."""
    validate_every: EveryShare = "epoch"
    """When to measure loss and ROUGE-L on data.valid: epoch, never, every so many optimiser steps, or a share
    of an epoch below 1 (0.1: ten times an epoch)."""
    save_every: Every = "epoch"
    """When to write a checkpoint to resume from."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay on disk."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the exported student."""
    validate_rouge: bool = True
    """Also generate with the student when it is validated; false measures the loss alone, which is faster."""
    best_by: Literal["rouge_l", "loss"] = "rouge_l"
    """What "best" is measured by, on data.valid."""
    fused: FusedConfig = FusedConfig()
    """Memory budget and precision of the loss over the language-model head."""
    report_to: ListOf[str] = ()
    """Loggers of Hugging Face: tensorboard, wandb, trackio, ... The first process alone reports, the rows of
    metrics.jsonl; of validation as eval/loss and so on."""
    hf: dict[str, Any] = Field(default_factory=dict)
    """Further fields of transformers.TrainingArguments, passed through as they are."""

    def options_without_effect(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.max_steps is not None:
            found |= because("train.max_steps decides", "epochs")
        if self.micro_batch_tokens is not None:
            found |= because("train.micro_batch_tokens decides", "micro_batch_size")
        if self.keep == "last":
            found |= because("train.keep is last", "best_by")
        if self.validate_every == "never":
            found |= because("train.validate_every is never", "validate_rouge")
        if self.save_every == "never":
            found |= because("train.save_every is never", "keep_checkpoints")
        return found

    @model_validator(mode="before")
    @classmethod
    def _default_micro_batch(cls, values: Any) -> Any:
        return values if isinstance(values, Mapping) and "micro_batch_tokens" in values else dividing(values)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.micro_batch_tokens is None:
            check_divisible(self.batch_size, self.micro_batch_size)
        for name in ("validate_every", "save_every"):
            every = getattr(self, name)
            if isinstance(every, int) and every < 1:
                raise ValueError(f"{name} must be at least 1, or epoch, or never")
            if isinstance(every, float) and not 0 < every < 1:
                raise ValueError(f"{name}: a share of an epoch lies between 0 and 1, got {every:g}")
        return self


def dividing(values: Any) -> Any:
    """Values of a config, with a `micro_batch_size` that divides their `batch_size` where they name none."""
    if not isinstance(values, Mapping) or "micro_batch_size" in values:
        return values
    batch_size = values.get("batch_size")
    if not isinstance(batch_size, int) or batch_size % MICRO_BATCH == 0:
        return values
    return {**values, "micro_batch_size": max(n for n in range(1, MICRO_BATCH) if batch_size % n == 0)}


def check_divisible(batch_size: int, micro_batch_size: int) -> None:
    """Raise a ValueError if a batch is no whole number of micro-batches."""
    if batch_size % micro_batch_size:
        raise ValueError(
            f"batch_size ({batch_size}) must be a multiple of micro_batch_size ({micro_batch_size})"
        )


def due(every: EveryShare, step: int, steps_per_epoch: int, last: bool) -> bool:
    """Whether something is due after step `step`; what happens at all also happens after the last one."""
    return every != "never" and (last or step % interval(every, steps_per_epoch) == 0)


def interval(every: EveryShare, steps_per_epoch: int) -> int:
    """The optimiser steps from one time to the next, for anything but "never"."""
    if isinstance(every, str):
        return max(1, steps_per_epoch)
    return max(1, round(every * steps_per_epoch) if isinstance(every, float) else every)
