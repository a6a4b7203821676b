"""The time of a whole run from what two steps took: what adds up, what is a range, what stays unknown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillhouse.runs.estimate import RunSize, run_size
from stillhouse.runs.measure import MeasuredCost, StepCost
from stillhouse.runs.resolve import Resolved, resolve
from stillhouse.runs.wall_time import MeasuredEvaluation, MeasuredPhases, Seconds, time_of_run, whole
from tests.workshop import Workshop

TAKEN = MeasuredPhases(
    starting=2.5, loading=4.0, first_step=3.0, last_step=2.0, teacher=0.5, generation=1.0, generated=100.0,
    checkpoint=0.5, validation=0.25, export=1.0, report=1.5, rest=0.5,
    evaluations=[MeasuredEvaluation(seconds=2.0, responses=4, tokens=16.0)],
)  # fmt: skip


def sized(**changes: object) -> tuple[Resolved, RunSize]:
    """A run of six steps whose rows are as long as the measured ones, and its data read in no time."""
    resolved = resolve("run.yaml", changes)
    size = run_size(resolved.config)
    return resolved, replace(size, pace=replace(size.pace, reading=0.0, longer=1.0))


def test_phases_add_up_to_the_whole_run(workshop: Workshop) -> None:
    resolved, size = sized(**{"train.epochs": 2.0, "output.report": True})
    found = time_of_run(resolved.config, size, TAKEN)
    assert found == {
        "starting": Seconds(2.5, 2.5),
        "loading": Seconds(4.0, 4.0),
        "training": Seconds(25.0, 25.0),
        "validation": Seconds(0.75, 0.75),
        "checkpoints": Seconds(1.0, 1.0),
        "export": Seconds(1.0, 1.0),
        "evaluation": Seconds(2.0, 4.0),
        "report": Seconds(1.5, 1.5),
        "all else": Seconds(0.5, 0.5),
    }, "12 steps, the first sets up; at the start and twice; answers of 4 of at most 8 tokens"
    assert whole(found) == Seconds(38.25, 40.25)


def test_rows_that_are_longer_than_the_measured_ones_take_longer(workshop: Workshop) -> None:
    resolved, size = sized()
    longer = replace(size, pace=replace(size.pace, reading=3.0, longer=1.5))
    found = time_of_run(resolved.config, longer, TAKEN)
    assert found["training"] == Seconds(13.0, 19.0)
    assert found["loading"] == Seconds(4.0, 7.0)


def test_a_student_that_has_learnt_may_write_as_short_as_the_teacher(workshop: Workshop) -> None:
    resolved, size = sized()
    teacher = MeasuredEvaluation(seconds=1.0, responses=4, tokens=8.0)
    both = replace(TAKEN, evaluations=[teacher, *TAKEN.evaluations])
    found = time_of_run(resolved.config, size, both)
    assert found["evaluation"] == Seconds(2.0, 8.0), "1 s and 2 s; the student's as short, or all of 8 tokens"
    assert found["validation"] == Seconds(0.375, 0.5), "the first one is before any step"


def test_the_faster_step_and_the_smaller_last_batch_count(workshop: Workshop) -> None:
    resolved, size = sized(**{"train.batch_size": 16, "train.micro_batch_size": 4})
    assert (size.facts["steps"], size.facts["prompts"]) == (2, 24)
    quick = replace(TAKEN, first_step=1.0)
    assert time_of_run(resolved.config, size, quick)["training"] == Seconds(1.5, 3.0)


def test_what_is_written_is_between_the_measured_and_the_greatest_length(workshop: Workshop) -> None:
    resolved, size = sized(responses="on_policy")
    assert size.writes["student"].responses == 24
    found = time_of_run(resolved.config, size, TAKEN)
    assert found["generation"] == Seconds(3.0, 3.0), "8 responses took 1 s; 24 of 8 tokens at 0.01 s are less"
    slow = replace(TAKEN, generated=10.0)
    assert time_of_run(resolved.config, size, slow)["generation"] == Seconds(3.0, pytest.approx(19.2))


def test_nothing_is_said_of_what_was_not_seen(workshop: Workshop) -> None:
    resolved, size = sized(responses="on_policy", **{"evaluate.tasks": [{"kind": "cost"}]})
    unseen = replace(TAKEN, generated=0.0, generation=0.0)
    found = time_of_run(resolved.config, size, unseen)
    assert found["generation"] == Seconds(0.0, pytest.approx(24.0)), "as fast as answers of the evaluation"
    assert found["evaluation tasks"] is None
    assert time_of_run(resolved.config, size, replace(unseen, evaluations=[]))["generation"] is None
    assert whole(found).high < float("inf")


def test_a_cache_that_is_filled_saves_the_teachers_part_later(workshop: Workshop) -> None:
    resolved, size = sized(teacher={"kind": "cache", "of": "teacher"})
    assert time_of_run(resolved.config, size, TAKEN)["training"] == Seconds(10.0, 13.0)


def test_the_share_of_the_processor() -> None:
    step = StepCost(seconds=4.0, processor=4.0, phases={}, tokens={})
    assert MeasuredCost(1e9, 64, step, threads=2, run=TAKEN).share_of_processor == 0.5
    assert MeasuredCost(1e9, 64, step, threads=1, run=TAKEN).share_of_processor == 1.0
