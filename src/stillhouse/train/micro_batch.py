"""What is passed between the phases of an optimiser step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.core.batch import Batch, TokenBatch
from stillhouse.core.host import carried
from stillhouse.core.rows import Rows
from stillhouse.core.types import Progress
from stillhouse.objectives import Objective
from stillhouse.train.gaps import SequenceGaps
from stillhouse.train.metrics import Metric


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass, with everything its loss depends on besides the models.

    Example: `MicroBatch(objective, batch, batch.rows(), token_weight)`
    """

    objective: Objective
    """As it applies in this step: numbers instead of schedules."""
    batch: Batch
    """What the student reads."""
    rows: Rows
    """Facts on the N response tokens."""
    token_weight: Tensor
    """[N] fp32: the weight of each in the loss of the step, every normalisation included."""
    teacher_batches: Mapping[str, TokenBatch] = field(default_factory=dict)
    """What teachers read, by name, that do not read `batch` itself: the same responses after prompts of their
    own, or for the main one the same text under its own tokenizer."""
    cache_slots: tuple[int, ...] = ()
    """For each sequence its slot in the cache of the teacher's hidden states; empty if nothing is cached."""

    def __len__(self) -> int:
        return len(self.batch)

    def __contains__(self, name: object) -> bool:
        """Hugging Face's trainer looks for `input_ids` to count floating-point operations."""
        return name == "input_ids"

    def __getitem__(self, name: str) -> Tensor:
        """The student's `input_ids`."""
        if name not in self:
            raise KeyError(name)
        return self.batch.input_ids

    def read_by(self, teacher: str) -> TokenBatch:
        """What the teacher of this name reads."""
        return self.teacher_batches.get(teacher, self.batch)

    def to(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on `device`, by one copy; host-side facts stay where they are."""
        moved = iter(carried(self.tensors(), device))

        def of(part: TokenBatch | Rows) -> Any:
            return part.with_tensors({name: next(moved) for name in part.tensors()})

        weight, batch, rows = next(moved), of(self.batch), of(self.rows)
        theirs = {name: of(one) for name, one in self.teacher_batches.items()}
        return replace(self, batch=batch, rows=rows, token_weight=weight, teacher_batches=theirs)

    def tensors(self) -> list[Tensor]:
        """All its tensors, each once."""
        parts: list[TokenBatch | Rows] = [self.batch, self.rows, *self.teacher_batches.values()]
        return [self.token_weight, *(one for part in parts for one in part.tensors().values())]


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """All of a step at once, for the trainer that does not know how many there will be."""

    parts: tuple[MicroBatch, ...]

    def __contains__(self, name: object) -> bool:
        """As `MicroBatch`."""
        return name == "input_ids"

    def __getitem__(self, name: str) -> Tensor:
        """The `input_ids` of all, one after the other."""
        return torch.cat([part[name].flatten() for part in self.parts])


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One optimiser step before its first forward pass."""

    progress: Progress
    """Steps done before it."""
    objective: Objective
    micro_batches: tuple[MicroBatch, ...]

    def with_objective(self, objective: Objective) -> PreparedStep:
        """The same step with another objective."""
        micro = tuple(replace(one, objective=objective) for one in self.micro_batches)
        return replace(self, objective=objective, micro_batches=micro)


@dataclass(frozen=True, slots=True)
class StepLoss:
    """The loss of one micro-batch and its metrics, all still on the device."""

    loss: Tensor
    """A scalar to call `backward` on: `value` times the number of ranks."""
    value: Tensor
    """Its part of the step's loss, in nats; detached."""
    metrics: dict[str, Metric]
    gaps: SequenceGaps | None = None
    """The likelihood gaps of its sequences, where an objective needs them."""
