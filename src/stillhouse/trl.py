"""TRL's distillation trainers by their names and defaults, so that a script needs another import only.

`from trl.experimental.gkd import GKDConfig, GKDTrainer` and `from trl import DistillationConfig,
DistillationTrainer` become `from stillhouse.trl import ...`. Names and defaults are those of TRL 1.16; what
there is not is refused with a word on what to do. TRL itself is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import Fault
from stillhouse.trainer.arguments import with_foreign_refused
from stillhouse.trainer.config import DistilConfig
from stillhouse.trainer.trainer import DistilTrainer


@with_foreign_refused
@dataclass
class _AsInTrl(DistilConfig):
    """What TRL's configurations have other defaults for than TrainingArguments."""

    logging_steps: float = 10
    gradient_checkpointing: bool | None = True
    bf16: bool | None = None

    def __post_init__(self) -> None:
        """bfloat16 unless fp16 is asked for."""
        if self.bf16 is None:
            self.bf16 = not self.fp16
        super().__post_init__()


@with_foreign_refused
@dataclass
class GKDConfig(_AsInTrl):
    """The arguments of TRL's GKDTrainer, with its defaults.

    One draw decides for a whole optimiser step whether the student writes, where TRL draws for each
    micro-batch on each process; the loss is divided by the tokens of the responses that are trained on, where
    TRL counts those of the rows.

    Example: `GKDConfig(output_dir="out", lmbda=0.5, beta=0.5, max_new_tokens=128)`
    """

    learning_rate: float = 2e-5
    """Of the optimiser, as in TrainingArguments."""
    lmbda: float | None = 0.5
    beta: float | None = 0.5
    temperature: float | None = 0.9
    max_new_tokens: int = 128
    """Most tokens that are written; TRL's name of `max_completion_length`."""
    max_length: int | None = 1024
    disable_dropout: bool = True

    def __post_init__(self) -> None:
        """Take over the limit of what is written."""
        self.max_completion_length = self.max_new_tokens
        super().__post_init__()


@with_foreign_refused
@dataclass
class DistillationConfig(_AsInTrl):
    """The arguments of TRL's DistillationTrainer, with its defaults: the student writes in every step.

    Example: `DistillationConfig(output_dir="out", beta=1.0, max_completion_length=256)`
    """

    learning_rate: float = 1e-6
    """Of the optimiser, as in TrainingArguments."""
    lmbda: float | None = 1.0
    beta: float | None = 1.0
    temperature: float | None = 1.0

    def _invalid(self) -> Iterator[Fault]:
        yield from super()._invalid()
        if self.temperature != 1.0 and self.beta not in (0.0, 1.0):
            yield Fault(
                "temperature",
                "would also divide the logits of the divergence, which only forward and reverse KL have",
                got=str(self.temperature),
                hint="Set beta=0 or beta=1, or use GKDConfig, whose temperature is that of sampling.",
            )

    @property
    def method(self) -> dict[str, Any]:
        """As GKD's numbers; the temperature divides the logits of the divergence too."""
        found = super().method
        if self.temperature not in (None, 1.0):
            found["objective"] = {**found["objective"], "temperature": self.temperature}
        return found


class GKDTrainer(DistilTrainer):
    """TRL's GKDTrainer by name: `lmbda`, `beta` and `seq_kd` are the method.

    Example: `GKDTrainer(model=student, teacher_model=teacher, args=GKDConfig("out"), train_dataset=rows)`
    """

    config_class = GKDConfig


class DistillationTrainer(DistilTrainer):
    """TRL's DistillationTrainer by name.

    Example: `DistillationTrainer(student, teacher, DistillationConfig("out"), train_dataset=prompts)`
    """

    config_class = DistillationConfig


__all__ = ["DistillationConfig", "DistillationTrainer", "GKDConfig", "GKDTrainer"]
