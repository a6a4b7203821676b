"""The thinnest adapter over Hugging Face's Trainer: it rents the loop and overrides two methods.

Responses are drawn in `get_batch_samples`, the one hook that runs once for each optimiser step before its
first forward pass; drawn in a dataset or collator, the first micro-batch would be a step stale, because
accelerate fetches one batch ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from stillhouse.core.types import Progress, Prompt
from stillhouse.train.step import Step


class DistilTrainer(Trainer):
    """Hugging Face's Trainer over prompts, with the loss of a `Step`."""

    def __init__(self, *, step: Step, **options: Any) -> None:
        super().__init__(data_collator=list, **options)
        self.step = step
        self.loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The prompts of one optimiser step, turned into finished micro-batches."""
        prompts, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not prompts:
            return [], None
        flat = [prompt for batch in prompts for prompt in batch]
        finished = self.step.prepare(flat, progress_of(self), num_micro=len(prompts))
        if self.step.looks_ahead:
            with self.compute_loss_context_manager():
                self.step.look(self.model_wrapped, map(self._prepare_inputs, finished))
        batches: tuple[list[Any], Any] = super().get_batch_samples(iter(finished), len(finished), device)
        return batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's part of the step's loss; every division is in its token weights already."""
        return self.step.loss(model, inputs)


def progress_of(trainer: Trainer) -> Progress:
    """How far a trainer has come, counted in optimiser steps so that it is exact."""
    steps_per_epoch = steps_in_epoch(trainer)
    step, max_steps = trainer.state.global_step, trainer.state.max_steps
    return Progress(step, max_steps, epoch=step / steps_per_epoch, epochs=max_steps / steps_per_epoch)


def steps_in_epoch(trainer: Trainer) -> int:
    """Optimiser steps in one pass over the prompts."""
    prompts = len(trainer.train_dataset)
    per_forward = trainer.args.per_device_train_batch_size * trainer.args.world_size
    forwards = math.ceil(prompts / per_forward)
    return max(1, math.ceil(forwards / trainer.args.gradient_accumulation_steps))


def steps_in_all(trainer: Trainer) -> int:
    """Optimiser steps of the whole training."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    return math.ceil(trainer.args.num_train_epochs * steps_in_epoch(trainer))


class Ranks:
    """The processes of a distributed run."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._device = device

    def add(self, counts: Tensor) -> Tensor:
        """Sum over all ranks."""
        if self.size == 1:
            return counts
        moved = counts.to(self._device)
        dist.all_reduce(moved)
        return moved.cpu()
