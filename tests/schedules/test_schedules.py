"""Schedules: ramps by their values, those that follow losses against the rules of paper and code."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from stillhouse.core.types import Progress
from stillhouse.schedules import DevLoss, GradualBeta, Momentum, PreviousRound, Schedule, ScheduleTracker
from stillhouse.schedules.base import Share
from stillhouse.schedules.ramps import Constant, Cosine, Linear


def at(schedule: Schedule, *fractions: float) -> list[float]:
    return [schedule.value(Progress(round(100 * x), 100, x, 1.0), {}) for x in fractions]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(at=0.3), [0.3, 0.3, 0.3, 0.3, 0.3]),
        (Linear(start=0.2, end=1.0), [0.2, 0.4, 0.6, 0.8, 1.0]),
        (Linear(start=1.0, end=0.2, until=0.5), [1.0, 0.6, 0.2, 0.2, 0.2]),
        (Linear(start=0.2, end=1.0, until=0.0), [1.0] * 5),
        (Cosine(start=1.0, end=0.0), [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]),
        (Cosine(start=0.2, end=0.6, until=0.5), [0.2, 0.4, 0.6, 0.6, 0.6]),
    ],
    ids=str,
)
def test_ramps_have_their_values_on_the_way(schedule: Schedule, expected: list[float]) -> None:
    found = at(schedule, 0.0, 0.25, 0.5, 0.75, 1.0)
    assert found == pytest.approx(expected, abs=1e-12)
    low, high = schedule.bounds()
    assert low - 1e-12 <= min(found) <= max(found) <= high + 1e-12


@pytest.mark.parametrize(("low", "high", "fits"), [(0.0, 1.0, True), (-0.01, 1.0, False), (0.0, 1.01, False)])
def test_a_share_may_touch_its_limits_and_no_more(low: float, high: float, fits: bool) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Share)
    with nullcontext() if fits else pytest.raises(ValidationError, match="between 0 and 1"):
        adapter.validate_python({"kind": "linear", "start": low, "end": high})


LOSSES = [2.0, 2.05, 2.2, 2.25, 2.4, 2.3, 2.45]
START = Progress(0, 10, 0.0, 1.0)


def after_each(schedule: DevLoss, losses: list[float]) -> list[float]:
    state, seen = schedule.initial(), []
    for loss in losses:
        state = schedule.observe(state, "dev_loss", loss, START)
        seen.append(round(schedule.value(START, state), 10))
    return seen


def paper(losses: list[float], tolerance: float, step: float) -> list[float]:
    """Algorithm 1: against the validation before."""
    share, seen = 0.0, [0.0]
    for before, now in pairwise(losses):
        share = min(1.0, share + step) if now > before + tolerance else share
        seen.append(round(share, 10))
    return seen


def released(losses: list[float], tolerance: float, step: float) -> list[float]:
    """finetune.py: the loss before is overwritten only when the threshold rises."""
    share, before, seen = 0.0, losses[0], [0.0]
    for now in losses[1:]:
        if now >= before + tolerance:
            share, before = min(1.0, share + step), now
        seen.append(round(share, 10))
    return seen


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.2])
def test_dev_loss_follows_paper_and_code(tolerance: float) -> None:
    last = after_each(DevLoss(tolerance=tolerance, against="last"), LOSSES)
    rise = after_each(DevLoss(tolerance=tolerance, against="last_rise"), LOSSES)
    assert last == paper(LOSSES, tolerance, 0.1)
    assert rise == released(LOSSES, tolerance, 0.1)


def test_the_two_rules_differ() -> None:
    creeping = [2.0, 2.06, 2.12, 2.18, 2.24]
    assert after_each(DevLoss(tolerance=0.1, against="last"), creeping)[-1] == 0.0
    assert after_each(DevLoss(tolerance=0.1, against="last_rise"), creeping)[-1] == 0.2


def test_dev_loss_stays_in_its_bounds_and_never_falls() -> None:
    schedule = DevLoss(start=0.5, step=0.3, maximum=0.9)
    seen = after_each(schedule, [1.0, 2.0, 3.0, 1.0, 4.0])
    assert seen == [0.5, 0.8, 0.9, 0.9, 0.9]
    assert schedule.bounds() == (0.5, 0.9)


def test_momentum_is_the_recurrence_of_the_released_code() -> None:
    schedule = Momentum(start=0.4, end=1.0, rate=0.05, momentum=0.9)
    losses = [3.0, 2.5, 2.6, 1.0, 0.5, 0.4]
    t, mean, before = 0.4, 0.0, None
    state = schedule.initial()
    for step, loss in enumerate(losses):
        now = Progress(step, 2000, step / 2000, 1.0)  # so long that the straight line does not lead
        t = min(1.0, max(0.4 + 0.6 * step / 2000, t))
        assert schedule.value(now, state) == pytest.approx(t, abs=1e-12)
        if before is not None:
            mean = 0.9 * mean + 0.1 * (before - loss) / (before + 1e-15)
            t = min(1.0, t + 0.05 / (1 + math.exp(-mean)) * (1 - t))
        before = loss
        state = schedule.observe(state, "train_loss", loss, now)
    assert t > 0.47 > 0.4 + 0.6 * len(losses) / 2000
    assert schedule.value(Progress(2000, 2000, 1.0, 1.0), state) == 1.0


def test_momentum_is_never_behind_the_straight_line() -> None:
    schedule, state = Momentum(rate=0.0), {}
    for step in range(11):
        now = Progress(step, 10, step / 10, 1.0)
        assert schedule.value(now, state) == pytest.approx(0.4 + 0.06 * step)
        state = schedule.observe(state, "train_loss", 1.0 + step, now)


def test_state_of_schedules_survives_a_save() -> None:
    tree = {"share": DevLoss(), "t": Momentum()}
    one, other = ScheduleTracker(tree), ScheduleTracker(tree)
    for name, value in (("dev_loss", 1.0), ("train_loss", 2.0), ("dev_loss", 1.5), ("train_loss", 1.0)):
        one.observe(name, value, START)
    other.load_state_dict(one.state_dict())
    assert other.resolve(tree, START) == one.resolve(tree, START)
    one.observe("dev_loss", 1.7, START)
    other.observe("dev_loss", 1.7, START)
    assert other.resolve(tree, START) == one.resolve(tree, START)
    assert one.resolve(tree, START)["share"] == pytest.approx(0.2)


def test_previous_round_is_the_mean_of_the_pass_before() -> None:
    schedule = PreviousRound(of="teacher_gap")
    state, seen = schedule.initial(), []
    for step, gap in enumerate([0.3, 0.1, 0.2, 0.6, 0.5, 0.1, 0.9]):
        now = Progress(step, 9, step / 3, 3.0)
        seen.append(round(schedule.value(now, state), 10))
        state = schedule.observe(state, "teacher_gap", gap, now)
        state = schedule.observe(state, "student_gap", 100.0, now)
        assert schedule.value(now, state) == pytest.approx(seen[-1])
    assert seen == [0, 0, 0, 0.2, 0.2, 0.2, 0.4]


def test_previous_round_is_never_negative() -> None:
    schedule = PreviousRound(of="student_gap")
    state = schedule.observe(schedule.initial(), "student_gap", -0.3, Progress(0, 2, 0.0, 2.0))
    assert schedule.value(Progress(1, 2, 1.0, 2.0), state) == 0.0


def beta(rule: str, steps_per_epoch: int = 4, epochs: int = 3) -> list[float]:
    schedule, total = GradualBeta(rule=rule), steps_per_epoch * epochs  # type: ignore[arg-type]
    return [
        schedule.value(Progress(step, total, step / steps_per_epoch, float(epochs)), {})
        for step in range(total)
    ]


def test_gradual_beta_of_the_paper_stays_and_then_rises_to_the_end() -> None:
    assert beta("paper") == pytest.approx([max(0.5, step / 12) for step in range(12)])


def test_gradual_beta_as_printed_falls_back_at_each_epoch() -> None:
    expected = [
        min(1.0, max(0.5, epoch / 3 + iteration / 4)) for epoch in (1, 2, 3) for iteration in range(4)
    ]
    assert beta("printed") == pytest.approx(expected)
    assert beta("printed")[3] == 1.0
    assert beta("printed")[4] == pytest.approx(2 / 3)


def test_gradual_beta_of_the_released_code_is_half_its_weight() -> None:
    released = [1 + 0.5 * min(1.0, 2 * step / 12) for step in range(12)]
    assert [2 * value for value in beta("released")] == pytest.approx(released)


@pytest.mark.parametrize("rule", ["paper", "printed", "released"])
def test_gradual_beta_stays_in_its_bounds(rule: str) -> None:
    low, high = GradualBeta(rule=rule).bounds()  # type: ignore[arg-type]
    assert low <= min(beta(rule))
    assert max(beta(rule)) <= high
