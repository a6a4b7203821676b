"""Alpha by likelihood gaps: of the whole step's batch, whatever the split, and of the round before."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from tests import tiny
from tests.train import steps
from tests.train.test_step import Given, groups_of
from torch import Tensor, nn

from stillhouse.core.types import Progress
from stillhouse.objectives import build
from stillhouse.rollouts.fixed import FixedConfig
from stillhouse.teachers.live import LiveTeacher
from stillhouse.train.step import Method, Step

SECOND = Progress(step=4, max_steps=12, epoch=1.0, epochs=3.0)
BATCH = build("contrastive", alpha_rule="gap", alpha_least=1e-3, alpha_most=0.99, alpha=0.5)
"""Wide bounds, so that alpha moves with every change of the reference."""
ROUND = build(
    "contrastive", alpha_rule="gap", teacher_gap="previous_round", student_gap="previous_round",
    alpha_least=1e-3, alpha_most=0.99, alpha=0.5,
)  # fmt: skip


def step_of(objective: object = BATCH, part: slice = slice(None)) -> Step:
    method = Method(FixedConfig(), objective, "sequence")  # type: ignore[arg-type]
    teacher = LiveTeacher(tiny.model(7, width=24, dtype=torch.float64), tiny.VOCAB)
    return Step(method, Given(groups_of(paired=True)[part]), {"main": teacher}, tiny.PAD, tiny.VOCAB)


def taken(
    step: Step, student: nn.Module, num_micro: int, progress: Progress = SECOND, padding: int = 0
) -> Tensor:
    """The gradient of a step."""
    return steps.taken(step, student, num_micro, progress, padding)[1]


class Recorded:
    """Collects what one rank adds, or adds what another had collected."""

    size = 2

    def __init__(self, theirs: list[Tensor] | None = None) -> None:
        self.own: list[Tensor] = []
        self.theirs = theirs

    def add(self, counts: Tensor) -> Tensor:
        self.own.append(counts.clone())
        return counts if self.theirs is None else counts + self.theirs[len(self.own) - 1]


def test_the_batch_is_the_steps_not_the_micro_batchs() -> None:
    student = tiny.model(1, dtype=torch.float64)
    whole = taken(step_of(), student, 1)
    for num_micro in (2, 4):
        for padding in (0, 5):
            split = taken(step_of(), student, num_micro, padding=padding)
            assert (split - whole).norm() <= 1e-6 * whole.norm()
    fixed = taken(step_of(build("contrastive", alpha=0.5)), student, 1)
    assert (fixed - whole).norm() > 1e-3 * whole.norm(), "the rule must matter, or this shows nothing"


def test_the_batch_is_that_of_all_ranks() -> None:
    student = tiny.model(1, dtype=torch.float64)
    whole = taken(step_of(), student, 1)
    parts = (slice(0, 1), slice(1, 4))
    alone = []
    for part in parts:  # what each rank adds does not depend on the others but through the mean itself
        step = step_of(part=part)
        step.world = Recorded()
        taken(step, student, 1)
        alone.append(step.world.own)
    both = []
    for part, other in zip(parts, reversed(alone), strict=True):
        step = step_of(part=part)
        step.world = Recorded(other)
        both.append(taken(step, student, 1))
    averaged = (both[0] + both[1]) / 2
    assert (averaged - whole).norm() <= 1e-6 * whole.norm()


def test_the_statistics_of_the_step_change_nothing_else() -> None:
    student = tiny.model(1, dtype=torch.float64)
    student.train()
    step = step_of()
    prepared = step.prepare([], SECOND, 2)
    state = torch.random.get_rng_state()
    step.metrics.row()
    began = time.perf_counter()
    assert step.with_batch_statistics(student, prepared).objective != prepared.objective
    whole, row = time.perf_counter() - began, step.metrics.row()
    assert row["seconds/batch_statistics"] > 0
    assert row["seconds/teacher"] + row["seconds/batch_statistics"] <= whole, "no second counts twice"
    assert student.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in student.parameters())


def test_the_first_epoch_has_the_base_alpha() -> None:
    student = tiny.model(1, dtype=torch.float64)
    first = replace(SECOND, step=3, epoch=0.75)
    fixed = build("contrastive", alpha=0.5)
    for objective in (BATCH, ROUND):
        assert torch.equal(
            taken(step_of(objective), student, 2, first), taken(step_of(fixed), student, 2, first)
        )
    at_once = BATCH.model_copy(update={"rule_after": 0.0})
    early, base = taken(step_of(at_once), student, 1, first), taken(step_of(fixed), student, 1, first)
    assert (early - base).norm() > 1e-3 * base.norm()


def test_the_round_before_reaches_the_next_one_and_the_log() -> None:
    student = tiny.model(1, dtype=torch.float64)
    step = step_of(ROUND)
    taken(step, student, 2, replace(SECOND, step=3, epoch=0.75))
    first = step.metrics.row()
    assert first["schedule/objective.teacher_gap"] == 0.0
    taken(step, student, 2)
    second = step.metrics.row()
    for side in ("teacher", "student"):
        mean = first[f"gap/{side}"]
        assert second[f"schedule/objective.{side}_gap"] == pytest.approx(max(0.0, mean))
    numbers = {f"{side}_gap": max(0.0, first[f"gap/{side}"]) for side in ("teacher", "student")}
    by_number = taken(step_of(ROUND.model_copy(update=numbers)), student, 2)
    assert torch.equal(by_number, taken(step, student, 2))


def test_a_step_without_the_rule_does_not_look_at_gaps() -> None:
    student = tiny.model(1, dtype=torch.float64)
    step = step_of(build("contrastive"))
    taken(step, student, 2)
    assert not any(name.startswith("gap/") for name in step.metrics.row())
