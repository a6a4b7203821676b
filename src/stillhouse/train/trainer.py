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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerControl, set_seed

from stillhouse.core.seeds import derived_seed
from stillhouse.core.types import Prompt
from stillhouse.errors import TrainingError
from stillhouse.models import unwrap
from stillhouse.models.sharding import TrainedStudent
from stillhouse.train.checkpoints import check_readable, load_renamed, load_state, reading
from stillhouse.train.driver import StepDriver, progress_of, prompts_in_step
from stillhouse.train.micro_batch import MicroBatch, MicroBatches
from stillhouse.train.parallelism import (
    add_gradients_up_in_fp32,
    check_launched,
    check_parallelism,
    groups_refused_in_words,
    let_models_be_whole,
    shards_weights,
)
from stillhouse.train.step import Step


class CheckpointLoading(Trainer):
    """How a checkpoint is loaded, whatever the trainer's loss: a damaged file is named, and the settings of
    the configuration outlive those of the checkpoint."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights; a checkpoint of another student is an error that names it."""
        with reading(Path(resume_from_checkpoint), "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if not self.is_fsdp_enabled:  # which has a file of its own, with the names of the model
                load_renamed(unwrap(self.model if model is None else model), Path(resume_from_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Not of weights that are tied to others, as a head to the embedding: no file holds them twice."""
        tied = getattr(unwrap(self.model), "all_tied_weights_keys", None) or ()
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random states of this process; the file has one for each device.

        Where there were more or fewer processes, all draw anew, by the seed, the step and the rank: some with
        their old states and some with none would not be more like the run before.
        """
        saved = 0 if checkpoint is None else len([*Path(checkpoint).glob("rng_state*.pth")])
        if saved not in (0, self.args.world_size):
            purpose = ("random states", self.state.global_step, self.args.process_index)
            set_seed(derived_seed(self.args.seed, *purpose) % 2**32)
            return
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

    def __init__(self, *, step: Step, model: nn.Module | TrainedStudent, **options: Any) -> None:
        """Around a step.

        Args:
            step: whose loss it takes.
            model: the student.
            **options: of `transformers.Trainer`.

        Raises:
            EnvironmentFault: the processes do not train in the way that was asked for.
        """
        check_launched(options["args"])
        if not isinstance(model, TrainedStudent):
            model = TrainedStudent(model, shards_weights(options["args"]))
        self.student = model
        """The student, whole for whatever reads it beside the training."""
        with groups_refused_in_words():
            super().__init__(data_collator=list, model=model.trained, **options)
        check_parallelism(self.accelerator, self.args)
        add_gradients_up_in_fp32(self.accelerator)
        let_models_be_whole()
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.driver = StepDriver(step, not sharded, self.student)
        self.callback_handler.callbacks.insert(0, self.driver)  # the others see a finished step
        self.loss_is_scaled_for_ga = True

    def load_step(self, checkpoint: Path) -> dict[str, Any]:
        """Put the step back to where it was, and return all that was saved beside it.

        Raises:
            TrainingError: the checkpoint cannot be used, or not by these processes, or its steps have another
                number of prompts.
        """
        step, args = self.driver.step, self.args
        check_readable(checkpoint, self.accelerator.state)
        saved = load_state(checkpoint, step.dealt_out)
        batch, now = saved["batch_size"], prompts_in_step(args)
        if batch != now:
            raise TrainingError(
                f"{checkpoint}: its steps have {batch} prompts, and now they would have {now} "
                f"(per_device_train_batch_size {args.per_device_train_batch_size} x "
                f"gradient_accumulation_steps {args.gradient_accumulation_steps} x {args.world_size} "
                f"processes): another batch and other places in the data. Set them so that they give {batch}."
            )
        step.load_state_dict(saved["step"])
        return saved

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
        new = self._num_new(len(flat))
        micro = self.driver.begin(self.model_wrapped, flat, progress, len(prompts), autocast, new)
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
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        for micro in before:
            self.accelerator.gradient_state._set_sync_gradients(False)
            with nullcontext() if each else self.accelerator.no_sync(model=model):
                losses.append(super().training_step(model, micro, num_items_in_batch))
            self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
        self.accelerator.gradient_state._set_sync_gradients(True)
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def _num_new(self, count: int) -> int | None:
        """How many of this process's prompts are not there only because all must have as many.

        accelerate takes prompts from the start of the epoch again until the last step of it has as many for
        each process; trained on, they would count twice. None: in this step no process has such prompts.
        """
        args, total = self.args, len(self.train_dataset)
        batch = prompts_in_step(args)
        left = total - self.state.global_step % steps_in_epoch(args, total) * batch
        if args.world_size == 1 or left >= batch:
            return None
        return sum(place < left for place in self.driver.step.world.local_indices(count))

    def report(self, measured: dict[str, float]) -> None:
        """Pass what was measured on held-out prompts on to the loggers of `report_to`, and leave the row of
        the step to come as it is due."""
        due = self.control.should_log
        self.log({f"eval_{name}": value for name, value in measured.items()})
        self.control.should_log = due

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
