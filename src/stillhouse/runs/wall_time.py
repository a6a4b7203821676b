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
class Range:
    """From one number to another: seconds, or tokens.

    Example: `Range(310.0, 420.0)`
    """

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def times(self, low: float, high: float | None = None) -> Range:
        """Both ends so many times."""
        return Range(self.low * low, self.high * (low if high is None else high))


def exactly(seconds: float) -> Range:
    """A range of one value."""
    return Range(seconds, seconds)


@dataclass(frozen=True, slots=True)
class MeasuredWriting:
    """Responses that a model wrote in one phase, and what that phase took.

    Example: `MeasuredWriting(seconds=3.2, responses=32, tokens=3100)`
    """

    seconds: float
    responses: int
    tokens: float
    """Of all responses together."""

    @property
    def length(self) -> float:
        """Tokens of a response in the mean."""
        return max(1.0, self.tokens / max(1, self.responses))


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What one optimiser step took.

    Example: `MeasuredStep(2.0, teacher=0.5, optimiser=0.1, kernel=0.0, tokens=1960.0, by_student=0.0)`
    """

    seconds: float
    """Without the writing of responses."""
    teacher: float
    """Of these, the teacher's part."""
    optimiser: float
    """Of these, what does not depend on tokens."""
    kernel: float
    """Of these, the kernel's part: the first steps wait for memory, which later ones have."""
    tokens: float
    """That the student read."""
    by_student: float
    """How many of the responses that were trained on the student had written."""


@dataclass(frozen=True, slots=True)
class MeasuredPhases:
    """What two steps took, in seconds by the clock or of the processor; None for what did not happen.

    Example: `MeasuredPhases(starting=5.2, loading=4.1, steps=[...], writings={}, ...)`
    """

    starting: float
    """Python, imports and the reading of the configuration, and the end of the process."""
    loading: float
    """Models and a few rows."""
    steps: Sequence[MeasuredStep]
    writings: Mapping[str, MeasuredWriting]
    """By "teacher" and "student", what was written for these steps."""
    checkpoint: float | None
    validation: float | None
    export: float | None
    report: float | None
    rest: float
    """Of the run, which is not in these: digests, facts, the card."""
    evaluations: Sequence[MeasuredWriting]
    """Of each system; the student that two steps have trained is the last one."""


def time_of_run(config: RunConfig, size: RunSize, taken: MeasuredPhases) -> dict[str, Range | None]:
    """Seconds of each phase of the whole run; None for one that nothing is known of.

    What is not trained writes in the run as long responses as it has written here. A student that is trained
    comes to write like what it learns from: at the low end as short responses as the shortest, at the high
    end as long as the longest in the mean, of the systems that are evaluated and of the data; where none of
    these is known but the student, as long as they may be. Training takes the seconds a token of the steps,
    at the low end those of the faster one, and without what the kernel took for memory that later steps have;
    where a teacher's cache is filled, the low end is that of steps that find all in it.

    Args:
        config: the run.
        size: its size.
        taken: what two steps of it took.
    """
    steps, per_epoch = size.facts["steps"], size.facts["steps_in_an_epoch"]
    found: dict[str, Range | None] = {
        STARTING: exactly(taken.starting),
        "loading": Range(max(taken.loading, size.pace.reading), taken.loading + size.pace.reading),
        "generation": _generation(config, size, taken),
        "training": _training(config, size, taken),
    }
    lengths = _lengths(config, size, taken)
    if config.train.validate_every != "never" and size.facts["held_out_prompts"]:
        later = _times(config.train.validate_every, steps, per_epoch)
        found["validation"] = None if taken.validation is None else _validation(taken, later, lengths)
    if config.train.save_every != "never":
        count = _times(config.train.save_every, steps, per_epoch)
        found["checkpoints"] = None if taken.checkpoint is None else exactly(count * taken.checkpoint)
    found["export"] = None if taken.export is None else exactly(taken.export)
    if EVALUATION in size.writes:
        found["evaluation"] = _evaluation(config, size, taken, lengths)
    if config.output.report:
        found["report"] = None if taken.report is None else exactly(taken.report)
    found["all else"] = exactly(taken.rest)
    if config.evaluate.tasks:
        found["evaluation tasks"] = None
    if found["generation"] == exactly(0.0):
        del found["generation"]
    return found


def whole(phases: Mapping[str, Range | None]) -> Range:
    """All phases that something is known of, together."""
    return sum((one for one in phases.values() if one is not None), exactly(0.0))


def _times(every: EveryShare, steps: int, per_epoch: int) -> int:
    """How often something happens that also happens after the last step."""
    between = interval(every, per_epoch)
    return steps // between + (steps % between > 0)


def _training(config: RunConfig, size: RunSize, taken: MeasuredPhases) -> Range:
    """The steps without what is written for them; the first one also sets up, and the last of an epoch may be
    smaller."""
    filling = any(teacher.fills_cache for teacher in config.all_teachers.values() if teacher.caches)
    first, last = taken.steps[0], taken.steps[-1]
    saved = [max(one.kernel, one.teacher if filling else 0.0) for one in taken.steps]
    low = min(
        max(0.0, one.seconds - one.optimiser - less) / one.tokens
        for one, less in zip(taken.steps, saved, strict=True)
    )
    high = (last.seconds - last.optimiser) / last.tokens
    full = size.facts["prompts"] / (size.facts["steps_in_an_epoch"] * config.train.batch_size)
    tokens = _tokens_in_a_step(config, size, taken)
    steps = tokens.times(low, high) + exactly(last.optimiser)
    set_up = first.seconds - last.optimiser - high * first.tokens
    return steps.times(size.facts["steps"] * full) + exactly(max(0.0, set_up))


def _tokens_in_a_step(config: RunConfig, size: RunSize, taken: MeasuredPhases) -> Range:
    """Tokens that the student reads in a full step of the run, from those that it read in two of them.

    Its own responses among them get as short or as long as `_lengths` says, and where a prompt is answered by
    it in some of the steps only, more or fewer take the place of others than in these two steps.
    """
    count = len(taken.steps)
    read = sum(one.tokens for one in taken.steps) / count * size.pace.longer
    if "student" not in size.writes:
        return exactly(read)
    here = sum(one.by_student for one in taken.steps) / count
    written, teacher = taken.writings.get("student"), taken.writings.get("teacher")
    if written is None:
        own, length = size.writes["student"].responses / size.facts["steps"], 0.0
    else:
        own, length = here * min(1.0, _generated(config, size, count) / written.responses), written.length
    others = teacher.length if teacher else size.pace.response or 0.0
    lengths = _lengths(config, size, taken)
    ends = [
        read - here * length + number * each + (here - number) * others
        for number in (own * _sure(config), own)
        for each in (lengths.low, lengths.high)
    ]
    return Range(max(0.0, min(ends)), max(ends))


def _generated(config: RunConfig, size: RunSize, steps: int) -> int:
    """How many responses the student is expected to write for the first steps."""
    batch = config.train.batch_size
    prompts = min(size.facts["prompts"], steps * batch)
    return int(config.responses.generated_responses(prompts, steps, batch).get("student", 0))


def _sure(config: RunConfig) -> float:
    """The share of the student's responses that is written whatever a schedule does."""
    return 0.0 if config.responses.follows_schedule() else 1.0


def _generation(config: RunConfig, size: RunSize, taken: MeasuredPhases) -> Range | None:
    """What the models write to be trained on."""
    found, lengths = exactly(0.0), _lengths(config, size, taken)
    for name, most in size.writes.items():
        if name == EVALUATION or not most.responses:
            continue
        one = taken.writings.get(name) or _in_evaluation(taken)
        if one is None:
            return None
        responses = exactly(one.seconds / one.responses * most.responses)
        if name == "student" or name not in taken.writings:
            responses = responses.times(lengths.low / one.length, lengths.high / one.length)
        found += responses.times(_sure(config) if name == "student" else 1.0, 1.0)
    return found


def _in_evaluation(taken: MeasuredPhases) -> MeasuredWriting | None:
    """Of all systems together: stands for a model that wrote nothing in these steps, as a schedule may."""
    responses = sum(one.responses for one in taken.evaluations)
    if not responses:
        return None
    every = taken.evaluations
    return MeasuredWriting(sum(one.seconds for one in every), responses, sum(one.tokens for one in every))


def _validation(taken: MeasuredPhases, later: int, lengths: Range) -> Range:
    """Once before training, and so many times later."""
    one = exactly(taken.validation or 0.0)
    if not taken.evaluations:
        return one.times(1 + later)
    written = taken.evaluations[-1].length
    return one + one.times(later).times(lengths.low / written, lengths.high / written)


def _evaluation(config: RunConfig, size: RunSize, taken: MeasuredPhases, lengths: Range) -> Range | None:
    """All systems on all held-out prompts."""
    if not taken.evaluations:
        return None
    responses = size.facts["held_out_prompts"] * len(config.evaluate.seeds)
    *others, student = [exactly(one.seconds / one.responses * responses) for one in taken.evaluations]
    written = taken.evaluations[-1].length
    return sum(others, student.times(lengths.low / written, lengths.high / written))


def _lengths(config: RunConfig, size: RunSize, taken: MeasuredPhases) -> Range:
    """Tokens of a response of the student in the mean, as short and as long as it may come to write."""
    own = [taken.evaluations[-1].length] if taken.evaluations else []
    own += [one.length for name, one in taken.writings.items() if name == "student"]
    models = [one.length for one in (*taken.evaluations[:-1], *taken.writings.values())]
    known = [*own, *models, *([size.pace.response] if size.pace.response else [])]
    if len(known) > len(own):
        return Range(min(known), max(known))
    most = float(max_tokens(config, config.evaluate))
    return Range(min([*known, most]), most)
