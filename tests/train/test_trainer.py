"""The adapter over Hugging Face's Trainer overrides two methods and equals the plain loop step by step."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests import tiny
from tests.conftest import ROOT, script
from transformers import Trainer, TrainingArguments

from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig, FixedPolicy
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step
from stillhouse.train.trainer import CheckpointLoading, StepTrainer


def test_the_adapter_shadows_three_methods_of_the_loop_and_four_that_load_a_checkpoint() -> None:
    own = {**vars(CheckpointLoading), **vars(StepTrainer)}
    ours = {name for name in own if not name.startswith("__")}
    loop = {"get_batch_samples", "training_step", "compute_loss"}
    loading = {"_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"}
    loading |= {"_issue_warnings_after_load"}
    assert ours & set(dir(Trainer)) == loop | loading


def test_instance_attributes_do_not_collide_with_the_trainers(tmp_path: Path) -> None:
    plain = Trainer(
        model=tiny.model(1), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    )
    assert "step" not in vars(plain)
    assert not hasattr(Trainer, "step")


def oracle() -> ModuleType:
    """examples/kd_loop.py, which imports nothing of ours."""
    return script(ROOT / "examples" / "kd_loop.py")


class Record:
    """Remembers the loss of every step and the prompts that it was given."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.losses: list[float] = []
        self.prompts: list[list[str]] = []

    def watch(self, trainer: StepTrainer) -> None:
        from transformers import TrainerCallback

        record = self

        class Watch(TrainerCallback):
            def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
                record.losses.append(record.step.last_loss)

        trainer.add_callback(Watch())


class Remembering(FixedPolicy):
    """The data set's responses, and a note of which prompts were asked for."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def draw(self, now, prompts, progress):  # type: ignore[no-untyped-def]
        self.seen.append([prompt.id for prompt in prompts])
        return super().draw(now, prompts, progress)


@pytest.mark.parametrize(("accumulation", "tokens"), [(1, None), (4, None), (1, 40)])
def test_the_library_matches_the_plain_loop_loss_by_loss(
    tmp_path: Path, accumulation: int, tokens: int | None
) -> None:
    prompts = tiny.prompts(40)
    student, teacher = tiny.model(1), tiny.model(7, width=24)
    ours = copy.deepcopy(student)
    policy = Remembering()
    step = Step(
        Method(FixedConfig(), build("forward_kl"), "token"),
        policy,
        {"main": LiveTeacher(teacher, tiny.VOCAB)},
        0,
        tiny.VOCAB,
        micro_batch_tokens=tokens,
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=3,
    )
    trainer = StepTrainer(step=step, model=ours, args=arguments, train_dataset=prompts)
    record = Record(step)
    record.watch(trainer)
    trainer.train()

    by_id = {prompt.id: (list(prompt.token_ids), list(prompt.response_ids or ())) for prompt in prompts}
    steps = [[by_id[name] for name in names] for names in policy.seen]
    assert len(steps) == 10
    assert {len(names) for names in policy.seen} == {8}
    losses = oracle().kd_losses(student, teacher, steps, pad_id=0, lr=1e-2, micro_batch=3)
    assert record.losses == pytest.approx(losses, rel=2e-4)
    assert losses[-1] < losses[0]
    for mine, theirs in zip(ours.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-4)


def test_every_epoch_sees_every_prompt_once(tmp_path: Path) -> None:
    prompts = tiny.prompts(22)
    policy = Remembering()
    student = tiny.model(1)
    step = Step(Method(FixedConfig(), build("cross_entropy"), "token"), policy, {}, 0, tiny.VOCAB)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    StepTrainer(step=step, model=student, args=arguments, train_dataset=prompts).train()
    assert [len(names) for names in policy.seen] == [8, 8, 6, 8, 8, 6]
    for epoch in (policy.seen[:3], policy.seen[3:]):
        assert sorted(name for names in epoch for name in names) == sorted(prompt.id for prompt in prompts)
