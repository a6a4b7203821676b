"""The thinnest adapter over Hugging Face's Trainer: it rents the loop and overrides three methods of it.

It also wraps how a checkpoint is loaded, so that the settings of the configuration outlive those of the
checkpoint, and a damaged file is an error that names it.

Responses are drawn in `get_batch_samples`, the one hook that runs once for each optimiser step before its
first forward pass; drawn in a dataset or collator, the first micro-batch would be a step stale, because
accelerate fetches one batch ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerControl

from stillhouse.core.types import Prompt
from stillhouse.models import unwrap
from stillhouse.train.checkpoints import load_renamed, reading
from stillhouse.train.driver import StepDriver, progress_of
from stillhouse.train.micro_batch import MicroBatch, MicroBatches
from stillhouse.train.parallelism import check_launched, check_parallelism
from stillhouse.train.step import Step


class CheckpointLoading(Trainer):
    """How a checkpoint is loaded, whatever the trainer's loss: a damaged file is named, and the settings of
    the configuration outlive those of the checkpoint."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights; a checkpoint of another student is an error that names it."""
        with reading(Path(resume_from_checkpoint), "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_renamed(unwrap(self.model if model is None else model), Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random states; the file has one for each device."""
        with reading(Path(checkpoint or ""), "rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The state of both, with the values of this run's configuration, which may be others than before.

        A checkpoint holds the learning rate, its peak, the weight decay and so on; loaded as they are, they
        would silently outlive whatever a resumed run sets.
        """
        fresh = [
            {name: value for name, value in group.items() if name != "params"}
            for group in getattr(self.optimizer, "param_groups", [])
        ]
        peaks = list(getattr(self.lr_scheduler, "base_lrs", []))
        with reading(Path(checkpoint or ""), "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return
        groups, done = self.optimizer.param_groups, self.lr_scheduler.last_epoch
        self.lr_scheduler.base_lrs = peaks
        now = [peak * rate(done) for peak, rate in zip(peaks, self.lr_scheduler.lr_lambdas, strict=True)]
        for group, values, rate in zip(groups, fresh, now, strict=True):
            group.update(values, lr=rate)
        self.lr_scheduler._last_lr = now


class StepTrainer(CheckpointLoading):
    """Hugging Face's Trainer over prompts, with the loss of a `Step`."""

    control: TrainerControl

    def __init__(self, *, step: Step, **options: Any) -> None:
        check_launched(options["args"])
        super().__init__(data_collator=list, **options)
        check_parallelism(self.accelerator, self.args)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.driver = StepDriver(step, keep_casts=not sharded)
        self.callback_handler.callbacks.insert(0, self.driver)  # the others see a finished step
        self.loss_is_scaled_for_ga = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The prompts of one optimiser step, turned into micro-batches."""
        prompts, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not prompts:
            return [], None
        flat = [prompt for batch in prompts for prompt in batch]
        progress = progress_of(self.state, steps_in_epoch(self.args, len(self.train_dataset)))
        autocast = self.compute_loss_context_manager()
        micro = self.driver.begin(self.model_wrapped, flat, progress, len(prompts), autocast)
        by_tokens = self.driver.step.micro_batch_tokens is not None
        return [MicroBatches(tuple(micro))] if by_tokens else micro, None

    def training_step(
        self,
        model: nn.Module,
        inputs: MicroBatch | MicroBatches,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one micro-batch, or of all of a step that a budget of tokens has split."""
        if isinstance(inputs, MicroBatch):
            return super().training_step(model, inputs, num_items_in_batch)
        *before, last = inputs.parts
        losses = []
        for micro in before:
            self.accelerator.gradient_state._set_sync_gradients(False)
            with self.accelerator.no_sync(model=model):
                losses.append(super().training_step(model, micro, num_items_in_batch))
            self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        self.accelerator.gradient_state._set_sync_gradients(True)
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def save_given_up_step(self) -> None:
        """Write the checkpoint of the last finished step, after a signal has broken off the one behind it."""
        self.model.zero_grad()
        self._save_checkpoint(self.model, trial=None)
        self.callback_handler.on_save(self.args, self.state, TrainerControl())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's part of the step's loss; every division is in its token weights already."""
        return self.driver.loss(model, inputs)


def steps_in_epoch(args: Any, num_prompts: int) -> int:
    """Optimiser steps in one pass over the prompts, under these TrainingArguments."""
    forwards = math.ceil(num_prompts / (args.per_device_train_batch_size * args.world_size))
    return max(1, math.ceil(forwards / args.gradient_accumulation_steps))


def steps_in_all(args: Any, num_prompts: int) -> int:
    """Optimiser steps of the whole training."""
    if args.max_steps > 0:
        return int(args.max_steps)
    return math.ceil(args.num_train_epochs * steps_in_epoch(args, num_prompts))


class Ranks:
    """The processes of a distributed run."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._device = device

    def add(self, counts: Tensor) -> Tensor:
        """All-reduce by sum."""
        if self.size == 1:
            return counts
        moved = counts.to(self._device)
        dist.all_reduce(moved)
        return moved.cpu()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank; it is pickled on its way."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found
