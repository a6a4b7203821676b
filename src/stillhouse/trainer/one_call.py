"""Distillation in one call."""

from __future__ import annotations

from typing import Any

from stillhouse.trainer.config import DistilConfig
from stillhouse.trainer.loaded import Model
from stillhouse.trainer.trainer import DistilTrainer


def distil(
    model: Model,
    teacher_model: Model | None,
    train_dataset: Any,
    *,
    output_dir: str = "distilled",
    processing_class: Any = None,
    objective: Any = None,
    responses: Any = None,
    resume: bool = False,
    **arguments: Any,
) -> DistilTrainer:
    """Train a student on a teacher and save it, with tokenizer, in `output_dir`.

    Args:
        model: the student, or its name; it is trained in place.
        teacher_model: the teacher, or its name.
        train_dataset: a `datasets.Dataset` or a list of rows in any format of docs/data.md.
        output_dir: where checkpoints and the student go.
        processing_class: the student's tokenizer; default: that of its name.
        objective: what is compared; see `DistilTrainer`.
        responses: whose responses are trained on; see `DistilTrainer`.
        resume: go on from the newest whole checkpoint in `output_dir`.
        **arguments: those of `DistilConfig`, such as `recipe="distillm"` and `learning_rate=1e-4`.

    Returns:
        The trainer: `.model` is the student, `.state.log_history` what was measured.

    Raises:
        StillhouseError: arguments, models or rows are not as needed; the message says what.

    Example: `distil("student", "teacher", rows, recipe="skl", max_steps=100).state.log_history[-1]`
    """
    trainer = DistilTrainer(
        model,
        teacher_model,
        DistilConfig(output_dir=output_dir, **arguments),
        train_dataset,
        processing_class=processing_class,
        objective=objective,
        responses=responses,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer
