"""How long a whole run takes, from what two steps of it took: every phase, as a range or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillhouse.runs.config import RunConfig
from stillhouse.runs.estimate import RunSize
from stillhouse.runs.size_facts import EVALUATION, max_tokens
from stillhouse.train.config import EveryShare, interval

STARTING = "starting"
"""The phase that all stages of a chain have once, for one process runs them."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """A range.

    Example: `Seconds(310.0, 420.0)`
    """

    low: float
    high: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.low + other.low, self.high + other.high)

    def times(self, low: float, high: float | None = None) -> Seconds:
        """Both ends so many times."""
        return Seconds(self.low * low, self.high * (low if high is None else high))


def exactly(seconds: float) -> Seconds:
    """A range of one value."""
    return Seconds(seconds, seconds)


@dataclass(frozen=True, slots=True)
class MeasuredEvaluation:
    """The evaluation of one system on a few held-out prompts.

    Example: `MeasuredEvaluation(seconds=3.2, responses=32, tokens=3100)`
    """

    seconds: float
    responses: int
    tokens: float
    """Of all responses together."""


@dataclass(frozen=True, slots=True)
class MeasuredPhases:
    """What two steps took besides their steps, in seconds by the clock; None for what did not happen.

    Example: `MeasuredPhases(starting=5.2, loading=4.1, first_step=2.0, last_step=1.5, ...)`
    """

    starting: float
    """Python, imports and the reading of the configuration, and the end of the process."""
    loading: float
    """Models and a few rows."""
    first_step: float
    last_step: float
    """Both without generation."""
    teacher: float
    """Of the last step: the teacher's part."""
    generation: float
    """Of both steps."""
    generated: float
    """Tokens that both wrote."""
    checkpoint: float | None
    validation: float | None
    export: float | None
    report: float | None
    rest: float
    """Of the run, which is not in these: digests, facts, the card."""
    evaluations: Sequence[MeasuredEvaluation]


def time_of_run(config: RunConfig, size: RunSize, taken: MeasuredPhases) -> dict[str, Seconds | None]:
    """Seconds of each phase of the whole run; None for one that nothing is known of.

    The low end of a phase that writes is for responses as long as the measured ones, the high end for such as
    are as long as they may be; that of what the student writes later is for responses as short as those of
    the system that writes shortest, for training changes them. The low end of training is the faster of the
    two steps and for rows as short, the high end the second step and for rows as long, as the shorter and the
    longer of all rows and the measured ones in the mean; where a teacher's cache is filled, the low end is
    that of steps that find all in it.

    Args:
        config: the run.
        size: its size.
        taken: what two steps of it took.
    """
    steps, per_epoch = size.facts["steps"], size.facts["steps_in_an_epoch"]
    found: dict[str, Seconds | None] = {
        STARTING: exactly(taken.starting),
        "loading": Seconds(max(taken.loading, size.pace.reading), taken.loading + size.pace.reading),
        "generation": _generation(config, size, taken),
        "training": _training(config, size, taken),
    }
    if config.train.validate_every != "never" and size.facts["held_out_prompts"]:
        count = 1 + _times(config.train.validate_every, steps, per_epoch)
        found["validation"] = (
            None
            if taken.validation is None
            else exactly(taken.validation).times(1 + (count - 1) * _shortest(taken), count)
        )
    if config.train.save_every != "never":
        count = _times(config.train.save_every, steps, per_epoch)
        found["checkpoints"] = None if taken.checkpoint is None else exactly(count * taken.checkpoint)
    found["export"] = None if taken.export is None else exactly(taken.export)
    if EVALUATION in size.writes:
        found["evaluation"] = _evaluation(config, size, taken)
    if config.output.report:
        found["report"] = None if taken.report is None else exactly(taken.report)
    found["all else"] = exactly(taken.rest)
    if config.evaluate.tasks:
        found["evaluation tasks"] = None
    if found["generation"] == exactly(0.0):
        del found["generation"]
    return found


def whole(phases: Mapping[str, Seconds | None]) -> Seconds:
    """All phases that something is known of, together."""
    return sum((one for one in phases.values() if one is not None), exactly(0.0))


def _times(every: EveryShare, steps: int, per_epoch: int) -> int:
    """How often something happens that also happens after the last step."""
    between = interval(every, per_epoch)
    return steps // between + (steps % between > 0)


def _training(config: RunConfig, size: RunSize, taken: MeasuredPhases) -> Seconds:
    """The steps without generation; the first one also sets up, and the last of an epoch may be smaller."""
    filling = any(teacher.fills_cache for teacher in config.all_teachers.values() if teacher.caches)
    faster = min(taken.first_step, taken.last_step)
    pace = Seconds(faster - (taken.teacher if filling else 0.0), taken.last_step)
    longer = size.pace.longer
    full = size.facts["prompts"] / (size.facts["steps_in_an_epoch"] * config.train.batch_size)
    steps = pace.times(size.facts["steps"] * full).times(min(1.0, longer), max(1.0, longer))
    return steps + exactly(max(0.0, taken.first_step - taken.last_step))


def _generation(config: RunConfig, size: RunSize, taken: MeasuredPhases) -> Seconds | None:
    """What the models write to be trained on."""
    writing = {name: one for name, one in size.writes.items() if name != EVALUATION}
    responses = sum(one.responses for one in writing.values())
    if not responses:
        return exactly(0.0)
    steps = 2
    prompts = min(size.facts["prompts"], steps * config.train.batch_size)
    two = sum(config.responses.generated_responses(prompts, steps, config.train.batch_size).values())
    if taken.generated:
        rate = taken.generation / taken.generated
        low = taken.generation * responses / max(1, two)
    else:  # none in these two steps, as a schedule may have it: as fast as in evaluation, or not at all
        tokens = sum(one.tokens for one in taken.evaluations)
        if not tokens:
            return None
        rate = sum(one.seconds for one in taken.evaluations) / tokens
        low = 0.0
    return Seconds(low, max(low, rate * sum(one.tokens for one in writing.values())))


def _evaluation(config: RunConfig, size: RunSize, taken: MeasuredPhases) -> Seconds | None:
    """All systems on all held-out prompts."""
    if not taken.evaluations:
        return None
    responses = size.facts["held_out_prompts"] * len(config.evaluate.seeds)
    most = max_tokens(config, config.evaluate)
    found = exactly(0.0)
    for n, one in enumerate(taken.evaluations, start=1):
        seconds = one.seconds / one.responses * responses
        low = seconds * (_shortest(taken) if n == len(taken.evaluations) else 1.0)
        found += Seconds(low, seconds * max(1.0, most * one.responses / max(1.0, one.tokens)))
    return found


def _shortest(taken: MeasuredPhases) -> float:
    """The mean length of the responses of the system that writes shortest, over that of the student's."""
    lengths = [one.tokens / one.responses for one in taken.evaluations]
    return min(lengths) / lengths[-1] if lengths and lengths[-1] else 1.0
