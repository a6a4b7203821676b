"""What a preference stage is: its pairs, how long and how fast it trains, and who computes its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from stillhouse.config import Registry, StrictConfig, because
from stillhouse.core.types import Prompt
from stillhouse.data.datasets import DatasetField
from stillhouse.train.config import Every, check_divisible

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class StageTraining:
    """What the trainer of another library is given."""

    student: nn.Module
    """The distilled student, which is trained in place."""
    reference: nn.Module
    """A frozen copy of it as it was."""
    prompts: Sequence[Prompt]
    """Preference pairs as token ids."""
    tokenizer: Any
    pad_id: int
    arguments: Any
    """An instance of `PreferenceStage.arguments_class`."""
    callbacks: Sequence[Any]


class PreferenceStage(StrictConfig):
    """Trains the distilled student on preference pairs; the student that is exported is the one after it."""

    kind: str
    data: DatasetField
    """The preference pairs, in the template and limits of `data`."""
    swap: bool = False
    """Train on the pairs with chosen and rejected exchanged, which gives the reverse teacher of AlignDistil
    (reverse DPO). `valid` is left as it is."""
    valid: DatasetField | None = None
    """Held-out pairs. With them each student of the run has the task `preference`: accuracy, margins, and
    after the stage the distance to the distilled student."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the pairs."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; if given, it decides instead of `epochs`."""
    batch_size: int = Field(128, ge=1)
    """Pairs in one optimiser step, over all processes."""
    micro_batch_size: int = Field(8, ge=1)
    """Pairs in one forward pass on one process."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay; none on biases and norms."""
    clip: float = Field(1.0, ge=0)
    """Greatest norm of the gradient; 0 switches clipping off."""
    log_every: int = Field(10, ge=1)
    """Optimiser steps between two rows of the stage's metrics."""
    save_every: Every = "epoch"
    """When to write a checkpoint to resume from."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay on disk."""

    def options_without_effect(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.max_steps is not None:
            found |= because("preference.max_steps decides", "epochs")
        if self.save_every == "never":
            found |= because("preference.save_every is never", "keep_checkpoints")
        return found

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        check_divisible(self.batch_size, self.micro_batch_size)
        return self

    @property
    def recipe(self) -> str | None:
        """The recipe whose objective and responses it trains with; None: the trainer of another library."""
        return None

    def check_installed(self) -> None:
        """Make sure that what it needs beyond the core is there.

        Raises:
            EnvironmentFault: with what to install.
        """

    def arguments_class(self) -> tuple[type, dict[str, Any]]:
        """Of another library's trainer: the class of its TrainingArguments, and the values beside the usual
        ones."""
        raise NotImplementedError(f"{self.kind} has no trainer of its own")

    def trainer(self, training: StageTraining) -> Any:
        """Another library's trainer, a subclass of `transformers.Trainer`."""
        raise NotImplementedError(f"{self.kind} has no trainer of its own")


REGISTRY: Registry[PreferenceStage] = Registry("preference stage", PreferenceStage, "dpo")
PreferenceField = Annotated[SerializeAsAny[PreferenceStage], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds a preference stage."""
