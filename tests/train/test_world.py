"""Two real processes (gloo) train as one does: same weights, although their token counts differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests import tiny
from tests.children import ranks
from transformers import TrainingArguments

from stillhouse.core.distributed import Ranks
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig, FixedPolicy
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step
from stillhouse.train.trainer import StepTrainer


def arguments_of_a_rank(
    folder: Path, steps: int, batch: int, accumulation: int, **more: Any
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=5,
        optim="sgd",
        **more,
    )


def train(folder: Path, accumulation: int, tokens: int) -> None:
    arguments = arguments_of_a_rank(folder, 4, 6 if tokens else 3, accumulation)
    student, teacher = tiny.model(1, dtype=torch.float64), tiny.model(7, width=24, dtype=torch.float64)
    step = Step(
        Method(FixedConfig(), build("forward_kl"), "token"),
        FixedPolicy(),
        {"main": LiveTeacher(teacher, tiny.VOCAB)},
        0,
        tiny.VOCAB,
        world=Ranks.of(arguments),
        micro_batch_tokens=tokens or None,
    )
    trainer = StepTrainer(step=step, model=student, args=arguments, train_dataset=tiny.prompts(48))
    trainer.train()
    if arguments.process_index == 0:
        folder.mkdir(exist_ok=True)
        torch.save(student.state_dict(), folder / "weights.pt")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return found


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    for name, count, accumulation, tokens in (("one", 1, 4, 0), ("two", 2, 2, 0), ("tokens", 2, 1, 30)):
        assert ranks(count, train, tmp_path / name, accumulation, tokens) == [0] * count
    alone = weights(tmp_path / "one")
    together = weights(tmp_path / "two")
    by_tokens = weights(tmp_path / "tokens")
    start = tiny.model(1, dtype=torch.float64).state_dict()
    moved = max((alone[name] - value).abs().max().item() for name, value in start.items())
    assert moved > 1e-3
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(by_tokens[name], expected, rtol=1e-9, atol=1e-11)
