"""The time of a whole run from what two steps took: what adds up, what is a range, what stays unknown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillhouse.runs.estimate import DataPace, RunSize, run_size
from stillhouse.runs.measure import MeasuredCost, StepCost
from stillhouse.runs.resolve import Resolved, resolve
from stillhouse.runs.wall_time import (
    MeasuredPhases,
    MeasuredStep,
    MeasuredWriting,
    Range,
    time_of_run,
    whole,
)
from tests.workshop import Workshop

TAKEN = MeasuredPhases(
    starting=2.5, loading=4.0, checkpoint=0.5, validation=0.25, export=1.0, report=1.5, rest=0.5,
    steps=[MeasuredStep(3.0, 0.5, 0.1, 0.0, 100.0, 0.0), MeasuredStep(2.0, 0.5, 0.1, 0.0, 100.0, 0.0)],
    writings={},
    evaluations=[MeasuredWriting(seconds=2.0, responses=4, tokens=16.0)],
)  # fmt: skip
ON_POLICY = replace(
    TAKEN,
    steps=[replace(one, by_student=4.0) for one in TAKEN.steps],
    writings={"student": MeasuredWriting(seconds=1.0, responses=8, tokens=48.0)},
)


def sized(**changes: object) -> tuple[Resolved, RunSize]:
    """A run of six steps whose rows are as long as the measured ones, and its data read in no time."""
    resolved = resolve("run.yaml", changes)
    size = run_size(resolved.config)
    return resolved, replace(size, pace=DataPace(reading=0.0, longer=1.0, response=4.0))


def near(low: float, high: float) -> Range:
    """A range, to rounding."""
    return Range(pytest.approx(low), pytest.approx(high))  # type: ignore[arg-type]


def test_phases_add_up_to_the_whole_run(workshop: Workshop) -> None:
    resolved, size = sized(**{"train.epochs": 2.0, "output.report": True})
    found = time_of_run(resolved.config, size, TAKEN)
    assert found == {
        "starting": Range(2.5, 2.5),
        "loading": Range(4.0, 4.0),
        "training": near(25.0, 25.0),
        "validation": Range(0.75, 0.75),
        "checkpoints": Range(1.0, 1.0),
        "export": Range(1.0, 1.0),
        "evaluation": Range(2.0, 2.0),
        "report": Range(1.5, 1.5),
        "all else": Range(0.5, 0.5),
    }, "12 steps, the first sets up; at the start and twice; the student writes as long as the data has it"
    assert whole(found) == near(38.25, 38.25)


def test_steps_of_longer_or_shorter_rows_count_by_their_tokens(workshop: Workshop) -> None:
    resolved, size = sized()
    pace = replace(size.pace, reading=3.0, longer=1.5)
    found = time_of_run(resolved.config, replace(size, pace=pace), TAKEN)
    assert found["training"] == near(6 * (0.1 + 1.9 * 1.5) + 1.0, 6 * (0.1 + 1.9 * 1.5) + 1.0)
    assert found["loading"] == Range(4.0, 7.0)
    short, long = replace(TAKEN.steps[0], tokens=60.0), replace(TAKEN.steps[1], tokens=140.0)
    uneven = time_of_run(resolved.config, size, replace(TAKEN, steps=[short, long]))["training"]
    assert uneven.high == pytest.approx(6 * (0.1 + 1.9 / 140 * 100) + 3.0 - 0.1 - 1.9 / 140 * 60)


def test_a_student_that_has_learnt_writes_like_its_teacher_or_the_data(workshop: Workshop) -> None:
    resolved, size = sized()
    teacher = MeasuredWriting(seconds=1.0, responses=4, tokens=8.0)
    both = replace(TAKEN, evaluations=[teacher, *TAKEN.evaluations])
    found = time_of_run(resolved.config, size, both)
    assert found["evaluation"] == Range(2.0, 3.0), "1 s of the teacher; 2 s of the student, or half as long"
    assert found["validation"] == Range(0.375, 0.5), "the first one is before any step"
    longer = replace(size, pace=replace(size.pace, response=6.0))
    assert time_of_run(resolved.config, longer, both)["evaluation"] == Range(2.0, 4.0)
    alone = replace(size, pace=replace(size.pace, response=None))
    found = time_of_run(resolved.config, alone, TAKEN)
    assert found["evaluation"] == Range(2.0, 4.0), "nothing else is known: up to all of 8 tokens"


def test_the_faster_step_and_the_smaller_last_batch_count(workshop: Workshop) -> None:
    resolved, size = sized(**{"train.batch_size": 16, "train.micro_batch_size": 4})
    assert (size.facts["steps"], size.facts["prompts"]) == (2, 24)
    quick = replace(TAKEN, steps=[replace(TAKEN.steps[0], seconds=1.0), TAKEN.steps[1]])
    assert time_of_run(resolved.config, size, quick)["training"] == near(1.5, 3.0)


def test_what_the_kernel_takes_for_memory_is_taken_once(workshop: Workshop) -> None:
    resolved, size = sized()
    faulting = replace(TAKEN, steps=[replace(one, kernel=0.4) for one in TAKEN.steps])
    assert time_of_run(resolved.config, size, faulting)["training"] == near(6 * 1.6 + 1.0, 13.0)


def test_what_the_student_writes_gets_as_short_or_long_as_what_it_learns_from(workshop: Workshop) -> None:
    resolved, size = sized(responses="on_policy")
    assert size.writes["student"].responses == 24
    found = time_of_run(resolved.config, size, ON_POLICY)
    assert found["generation"] == near(2.0, 3.0), "8 of 6 tokens took 1 s; 24 of 4 (the data) to 6 tokens"
    assert found["training"] == near(6 * (0.1 + 1.9 * 0.92) + 1.0, 13.0), "4 of 100 tokens by 4 less"


def test_the_teacher_goes_on_writing_as_it_has(workshop: Workshop) -> None:
    resolved, size = sized(responses={"kind": "generated", "by": "teacher"})
    assert size.writes["teacher"].responses == 24
    written = replace(TAKEN, writings={"teacher": MeasuredWriting(seconds=1.0, responses=8, tokens=16.0)})
    assert time_of_run(resolved.config, size, written)["generation"] == near(3.0, 3.0)


def test_half_of_the_steps_are_on_policy_whatever_the_two_were(workshop: Workshop) -> None:
    resolved, size = sized(responses={"kind": "mixed", "student_share": 0.5})
    assert size.writes["student"].responses == 12
    found = time_of_run(resolved.config, size, ON_POLICY)
    assert found["generation"] == near(1.0, 1.5)
    assert found["training"] == near(6 * (0.1 + 1.9 * 0.92) + 1.0, 6 * (0.1 + 1.9 * 0.96) + 1.0)
    none = time_of_run(resolved.config, size, TAKEN)
    assert none["generation"] == near(6.0, 6.0), "12 of 4 tokens, as fast as answers of the evaluation"
    assert none["training"] == near(13.0, 13.0), "as long as the rows that they take the place of"


def test_a_schedule_may_let_the_student_write_nothing(workshop: Workshop) -> None:
    share = {"kind": "linear", "start": 0.0, "end": 1.0}
    resolved, size = sized(responses={"kind": "mixed", "student_share": share})
    assert time_of_run(resolved.config, size, TAKEN)["generation"] == near(0.0, 12.0)
    assert time_of_run(resolved.config, size, ON_POLICY)["generation"] == near(0.0, 3.0)


def test_nothing_is_said_of_what_was_not_seen(workshop: Workshop) -> None:
    resolved, size = sized(responses="on_policy", **{"evaluate.tasks": [{"kind": "cost"}]})
    found = time_of_run(resolved.config, size, TAKEN)
    assert found["generation"] == near(12.0, 12.0), "as fast as answers of the evaluation"
    assert found["evaluation tasks"] is None
    assert time_of_run(resolved.config, size, replace(TAKEN, evaluations=[]))["generation"] is None
    assert whole(found).high < float("inf")


def test_a_cache_that_is_filled_saves_the_teachers_part_later(workshop: Workshop) -> None:
    resolved, size = sized(teacher={"kind": "cache", "of": "teacher"})
    assert time_of_run(resolved.config, size, TAKEN)["training"] == near(10.0, 13.0)


def test_the_share_of_the_processor() -> None:
    step = StepCost(seconds=4.0, processor=4.0, phases={}, tokens={})
    assert MeasuredCost(1e9, 64, step, threads=2, run=TAKEN, run_processor=TAKEN).share_of_processor == 0.5
    assert MeasuredCost(1e9, 64, step, threads=1, run=TAKEN, run_processor=TAKEN).share_of_processor == 1.0
