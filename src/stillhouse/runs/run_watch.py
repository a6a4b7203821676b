"""Watches a run from outside while it goes on: what its phases take, by the clock and of the processor."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Spent = tuple[float, float, float]
"""Seconds by the clock; of the processor, all threads together; and of these, of the kernel."""
CLOCK, PROCESSOR, KERNEL = 0, 1, 2
NOTHING: Spent = (0.0, 0.0, 0.0)


def now() -> Spent:
    """This moment."""
    return time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime


def plus(*every: Spent) -> Spent:
    """The sum."""
    clock, processor, kernel = (sum(one[by] for one in every) for by in (CLOCK, PROCESSOR, KERNEL))
    return clock, processor, kernel


def minus(one: Spent, other: Spent) -> Spent:
    """The difference."""
    return one[CLOCK] - other[CLOCK], one[PROCESSOR] - other[PROCESSOR], one[KERNEL] - other[KERNEL]


def since(began: Spent) -> Spent:
    """What has passed."""
    return minus(now(), began)


@contextmanager
def replaced(owner: Any, **functions: Any) -> Iterator[None]:
    """Others in the place of functions of a module or methods of a class while the block runs."""
    before = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(owner, name, original)


class Stopwatch:
    """Seconds of each call of some functions, by the clock and of the processor.

    Example:
        >>> with watch.on(execute, export="export"):
        ...     run("run.yaml")
        >>> watch.longest("export")
    """

    def __init__(self) -> None:
        self._spent: dict[str, list[Spent]] = {}

    def of(self, name: str) -> Sequence[Spent]:
        """Of each call."""
        return self._spent.get(name, [])

    def together(self, *names: str) -> Spent:
        """Of all calls of the functions with these names, or of all functions."""
        return plus(*(spent for name in names or self._spent for spent in self.of(name)))

    def longest(self, name: str, by: int = CLOCK) -> float | None:
        """Of the longest call; None if there was none."""
        return max((one[by] for one in self.of(name)), default=None)

    @contextmanager
    def on(self, owner: Any, **names: str) -> Iterator[None]:
        """Time functions of a module or methods of a class while the block runs.

        Args:
            owner: the module or class.
            names: the function -> what its seconds are called.
        """
        timed = {function: self._timed(getattr(owner, function), name) for function, name in names.items()}
        with replaced(owner, **timed):
            yield

    def _timed(self, function: Any, name: str) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            began = now()
            try:
                return function(*args, **options)
            finally:
                self._spent.setdefault(name, []).append(since(began))

        return timed


class RunWatch:
    """What each phase of a run takes.

    Example:
        >>> with watch.on():
        ...     run("run.yaml")
        >>> watch.phases.longest("export")
    """

    def __init__(self) -> None:
        self.whole = Stopwatch()
        """The run, from when its configuration was read."""
        self.phases = Stopwatch()
        """Loading, evaluation, export, report, validation, checkpoints."""
        self.steps = StepWatch()
        self.writing = WritingWatch()
        self.training = TrainingWatch(self.phases, self.writing)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch while the block runs."""
        from stillhouse.rollouts.generator import ResponseGenerator
        from stillhouse.runs import execute
        from stillhouse.train.callbacks import MetricsLog, Validation
        from stillhouse.train.step import Step
        from stillhouse.train.trainer import StepTrainer

        with (
            self.phases.on(execute, assemble="loading", evaluate_system="evaluation", export="export"),
            self.phases.on(execute, _write_report="report"),
            self.phases.on(Validation, now="validation"),
            self.phases.on(StepTrainer, _save_checkpoint="checkpoints"),
            self.whole.on(execute, execute="run"),
            self.steps.on(Step),
            self.writing.on(ResponseGenerator),
            self.training.on(MetricsLog),
        ):
            yield


class WritingWatch:
    """Counts and times what the models write to be trained on."""

    def __init__(self) -> None:
        self.by_source: dict[str, Written] = {}
        """By "teacher" and "student"."""

    @property
    def spent(self) -> Spent:
        """Of all writing so far."""
        return plus(*(one.spent for one in self.by_source.values()))

    def on(self, generator: Any) -> Any:
        """Watch every instance of a class of generators while the block runs."""
        generate = generator.generate

        def watched(itself: Any, *args: Any, **options: Any) -> Any:
            began = now()
            responses = generate(itself, *args, **options)
            if not responses:
                return responses
            written = self.by_source.setdefault(itself.source, Written())
            written.spent = plus(written.spent, since(began))
            written.responses += len(responses)
            written.tokens += sum(len(one.token_ids) for one in responses)
            return responses

        return replaced(generator, generate=watched)


@dataclass
class Written:
    """What one model has written so far."""

    spent: Spent = NOTHING
    responses: int = 0
    tokens: int = 0

    def fields(self, by: int) -> dict[str, float]:
        """Those of `MeasuredWriting`."""
        return {"seconds": self.spent[by], "responses": self.responses, "tokens": self.tokens}


class TrainingWatch:
    """What the optimiser steps between two rows of the log take, without validation and checkpoints."""

    def __init__(self, phases: Stopwatch, writing: WritingWatch) -> None:
        self.steps: list[Spent] = []
        """Of the steps up to each row, with what was written for them."""
        self.writing: list[Spent] = []
        """Of these, what was written."""
        self._phases, self._writing = phases, writing
        self._last = self._now()

    def on(self, log: Any) -> Any:
        """Watch every instance of a class of logs while the block runs."""
        begin, write = log.on_train_begin, log.write

        def watched_begin(itself: Any, *args: Any, **options: Any) -> Any:
            self._last = self._now()
            return begin(itself, *args, **options)

        def watched_write(itself: Any, phase: str, *rest: Any) -> None:
            write(itself, phase, *rest)
            if phase == "train":
                before, self._last = self._last, self._now()
                for each, old, new in zip((self.steps, self.writing), before, self._last, strict=True):
                    each.append(minus(new, old))

        return replaced(log, on_train_begin=watched_begin, write=watched_write)

    def _now(self) -> tuple[Spent, Spent]:
        """On training so far, from any beginning; and on writing."""
        beside = self._phases.together("validation", "checkpoints")
        return minus(now(), beside), self._writing.spent


class StepWatch:
    """Notes what no log of a run has: the largest micro-batch, and the processor's seconds of a step."""

    def __init__(self) -> None:
        self.tokens = 0
        """Of the largest micro-batch, padding included."""
        self.processor = 0.0
        """Seconds of the last step, of all threads."""

    def on(self, step: Any) -> Any:
        """Watch every instance of a class of steps while the block runs."""
        prepare, loss, finish = step.prepare, step.loss, step.finish
        began = 0.0

        def watched_prepare(itself: Any, *args: Any, **options: Any) -> Any:
            nonlocal began
            began = time.process_time()
            return prepare(itself, *args, **options)

        def watched_loss(itself: Any, model: Any, micro: Any, *rest: Any, **options: Any) -> Any:
            self.tokens = max(self.tokens, micro.batch.input_ids.numel())
            return loss(itself, model, micro, *rest, **options)

        def watched_finish(itself: Any, *args: Any, **options: Any) -> Any:
            found = finish(itself, *args, **options)
            self.processor = time.process_time() - began
            return found

        return replaced(step, prepare=watched_prepare, loss=watched_loss, finish=watched_finish)
