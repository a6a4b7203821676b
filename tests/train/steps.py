"""A step as the trainer takes it, without a trainer."""

from __future__ import annotations

from dataclasses import replace

import torch
from tests import tiny
from torch import Tensor, nn

from stillhouse.core.batch import TokenBatch
from stillhouse.core.types import Progress
from stillhouse.data.collate import collate
from stillhouse.train.micro_batch import MicroBatch, PreparedStep
from stillhouse.train.step import Step


def taken(
    step: Step, student: nn.Module, num_micro: int, progress: Progress, padding: int = 0
) -> tuple[float, Tensor]:
    """The loss of a step and its gradient as one vector; the step is finished."""
    student.zero_grad()
    prepared = widened(step.prepare([], progress, num_micro), padding)
    prepared = step.with_batch_statistics(student, prepared)
    losses = [step.loss(student, micro) for micro in prepared.micro_batches]
    for one in losses:
        one.loss.backward()
    step.check_finite(prepared, losses)
    step.finish(prepared, losses)
    total = sum(one.loss.item() for one in losses)
    return total, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def widened(prepared: PreparedStep, padding: int) -> PreparedStep:
    """The same step with more padding on the right of what both models read."""
    if not padding:
        return prepared
    return replace(prepared, micro_batches=tuple(_wider(one, padding) for one in prepared.micro_batches))


def _wider(micro: MicroBatch, padding: int) -> MicroBatch:
    batch = collate(micro.batch.responses, tiny.PAD, micro.batch.input_ids.shape[1] + padding)
    theirs = {
        name: TokenBatch.of(
            one.token_ids, one.prompt_lengths, 0, one.input_ids.shape[1] + padding, images=one.images
        )
        for name, one in micro.teacher_batches.items()
    }
    return replace(micro, batch=batch, teacher_batches=theirs)
