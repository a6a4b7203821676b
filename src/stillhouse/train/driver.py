"""Drives a `Step` through the hooks of Hugging Face's trainer, and times what lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from stillhouse.core.types import Progress, Prompt
from stillhouse.models.sharding import TrainedStudent, keep_head_whole
from stillhouse.train.micro_batch import MicroBatch, PreparedStep, StepLoss
from stillhouse.train.step import Step


class StepDriver(TrainerCallback):
    """Holds the step that is under way: prepared, its losses so far, its end.

    The first of all callbacks, so that the others see a finished step. Besides the phases that the step times
    itself it adds the seconds of backward passes and of the optimiser.
    """

    def __init__(self, step: Step, keep_casts: bool = True, student: TrainedStudent | None = None) -> None:
        """Around a step.

        Args:
            step: what it drives.
            keep_casts: whether weights that mixed precision casts for the first micro-batch of a step are
                kept for the others; not for sharded weights, which would then be whole all the time.
            student: the one that is trained; None: a model that is never sharded.
        """
        self.step = step
        self._student = student
        self._keep_casts = keep_casts
        self._casts = ExitStack()
        self._prepared: PreparedStep | None = None
        self._losses: list[StepLoss] = []
        self._forward_ended = self._optimiser_began = step.metrics.mark()

    def begin(
        self,
        model: nn.Module,
        prompts: Sequence[Prompt],
        progress: Progress,
        num_micro: int,
        autocast: AbstractContextManager[Any],
        num_new: int | None = None,
    ) -> list[MicroBatch]:
        """The micro-batches of the next optimiser step; statistics of the whole step under `autocast`."""
        self.release()
        with self._whole_student():
            prepared = self.step.prepare(prompts, progress, num_micro, num_new)
        with autocast:
            self._prepared = self.step.with_batch_statistics(model, prepared)
        self._losses = []
        return list(self._prepared.micro_batches)

    def loss(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        """The loss of one of them, to call `backward` on."""
        assert self._prepared is not None
        later = self._prepared.micro_batches[len(self._losses) + 1 :]
        self._open_casts(next(model.parameters()).device.type)
        if self._student is not None and self._student.sharded:
            keep_head_whole(model, bool(later))
        found = self.step.loss(model, micro, later[0] if later else None)
        self._losses.append(found)
        self._forward_ended = self.step.metrics.mark()
        return found.loss

    def _whole_student(self) -> AbstractContextManager[None]:
        """The student gathered where responses may be drawn or judged with it: unless the data has all."""
        if self._student is None or self.step.method.responses.sources() <= {"fixed"}:
            return nullcontext()
        return self._student.gathered()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The trainer has sharded the weights, if they are to be."""
        if self._student is not None:
            self._student.release()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A micro-batch that is not the last of its step has been through the backward pass."""
        self._backward_ended()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last micro-batch has, and gradients are clipped; the weights have not changed yet."""
        self._backward_ended()
        self.release()
        assert self._prepared is not None
        self.step.check_finite(self._prepared, self._losses)
        self._optimiser_began = self.step.metrics.mark()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The weights have changed."""
        self.step.metrics.since("optimiser", self._optimiser_began)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Finish the step before any other callback reads its loss or saves it."""
        assert self._prepared is not None
        self.step.finish(self._prepared, self._losses)
        self._prepared, self._losses = None, []

    def _open_casts(self, device: str) -> None:
        """Hold open an autocast that does nothing, until the weights change.

        Mixed precision enters its autocast at each call of the student and forgets its casts of the weights
        when it leaves the outermost one, which this is. Backward passes run in no other autocast than before.
        """
        if self._keep_casts and not self._losses:
            torch.clear_autocast_cache()
            self._casts.enter_context(torch.autocast(device, enabled=False))

    def release(self) -> None:
        """Forget the casts of weights: before these change, and where a step is broken off."""
        self._casts.close()
        torch.clear_autocast_cache()

    def _backward_ended(self) -> None:
        self.step.metrics.since("backward", self._forward_ended)


def prompts_in_step(args: Any) -> int:
    """The prompts of one optimiser step, those of all processes together, under these TrainingArguments."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def progress_of(state: Any, steps_per_epoch: int, max_steps: int | None = None) -> Progress:
    """How far a trainer has come, counted in optimiser steps so that it is exact.

    Args:
        state: the trainer's.
        steps_per_epoch: optimiser steps in one pass over the prompts.
        max_steps: of the whole training, where the trainer has not begun and does not know yet.
    """
    step, max_steps = state.global_step, max_steps or state.max_steps
    return Progress(step, max_steps, epoch=step / steps_per_epoch, epochs=max_steps / steps_per_epoch)
