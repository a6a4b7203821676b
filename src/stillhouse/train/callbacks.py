"""Trainer callbacks: the metrics log, validation, checkpoints, progress.

One callback each. They read the step, which `StepDriver` alone drives; only validation feeds back into it
(`observe`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from stillhouse import console
from stillhouse.core.types import Progress
from stillhouse.files import append_jsonl, read_jsonl_leniently, write_jsonl
from stillhouse.models import copy_processor_of
from stillhouse.train import checkpoints
from stillhouse.train.config import TrainConfig, due
from stillhouse.train.device import device_memory
from stillhouse.train.driver import progress_of, prompts_in_step
from stillhouse.train.interrupt import Interrupt
from stillhouse.train.metrics import over_processes
from stillhouse.train.step import Step

logger = logging.getLogger("stillhouse")

Validate = Callable[[], dict[str, float]]


def measured(step: Step) -> dict[str, float]:
    """What all processes have measured since this was last asked; every one of them has to ask."""
    metrics, world = step.metrics, step.world
    if world.size == 1:
        return metrics.row()
    whole = over_processes(world.gather(metrics.state_dict()))
    metrics.clear()
    return whole.row()


class MetricsLog(TrainerCallback):
    """Writes `metrics.jsonl`: a row for every `log_every` steps and the last one, and for each validation."""

    def __init__(self, path: Path, step: Step) -> None:
        self._path = path
        self._step = step
        self._last = time.perf_counter()

    def cut(self, after: int) -> None:
        """Remove rows after optimiser step `after`, which a resumed run will write again."""
        rows, damaged = read_jsonl_leniently(self._path)
        numbered = [row for row in rows if isinstance(row.get("step"), int)]
        damaged += len(rows) - len(numbered)
        if damaged:
            logger.warning("%s: %d damaged lines are left out", self._path, damaged)
        kept = [row for row in numbered if row["step"] <= after]
        if damaged or len(kept) < len(numbered) or not rows:
            write_jsonl(self._path, kept)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last step is always logged."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def pause(self, seconds: float) -> None:
        """Leave time that was not spent on training out of the next row."""
        self._last += seconds

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add the step's metrics to the trainer's log row, also for TensorBoard and others, and write it.

        The row that ends a training loses its mean loss: of steps behind the last row, which only a signal
        leaves, it would have this process's part, and the others' not.
        """
        if logs is not None:
            logs.pop("train_loss", None)
        if logs is None or "learning_rate" not in logs:
            return
        row = measured(self._step)
        if not state.is_world_process_zero:
            return
        seconds = time.perf_counter() - self._last
        self._last = time.perf_counter()
        logs.update(row | device_memory(args.device))
        logs["seconds"] = seconds
        logs["tokens_per_second"] = logs.get("tokens", 0.0) / max(seconds, 1e-9)
        self.write("train", state.global_step, logs)

    def write(self, phase: str, step: int, values: dict[str, Any]) -> None:
        """Append one row."""
        append_jsonl(
            self._path, {"phase": phase, "step": step, **{k: v for k, v in values.items() if k != "step"}}
        )


class Validation(TrainerCallback):
    """Measures the student on data.valid, updates the schedules, and keeps the best weights."""

    def __init__(
        self,
        config: TrainConfig,
        step: Step,
        log: MetricsLog,
        measure: Validate,
        keep_best: Callable[[], None],
        steps_per_epoch: int,
        gathered: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._config = config
        self._step = step
        self._log = log
        self._gathered = gathered
        self._measure = measure
        self._keep_best = keep_best
        self._steps_per_epoch = steps_per_epoch
        self._unreported: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.report: Callable[[dict[str, float]], None] | None = None
        """Passes values on to the loggers of `train.report_to`."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report what was measured before the training began, and with it the loggers."""
        self._report()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Validate when due; before a checkpoint of the same step, so that it is part of it."""
        if due(
            self._config.validate_every,
            state.global_step,
            self._steps_per_epoch,
            state.global_step >= state.max_steps,
        ):
            self.now(progress_of(state, self._steps_per_epoch), state.is_world_process_zero)
            self._report()

    def _report(self) -> None:
        if self.report is not None and self._unreported:
            self.report(self._unreported)
        self._unreported = {}

    def now(self, progress: Progress, main: bool = True) -> None:
        """Measure, log, update the schedules, keep the weights if they are the best so far."""
        with self._gathered():
            self._now(progress, main)

    def _now(self, progress: Progress, main: bool) -> None:
        start, step = time.perf_counter(), progress.step
        with console.phase(f"Validating at step {step:,}", quiet=True):
            values = self._measure()
        spent = time.perf_counter() - start
        self._log.pause(spent)
        self._step.observe("dev_loss", values["loss"], progress)
        self._unreported = values
        if main:
            self._log.write("valid", step, {**values, "seconds/evaluate": spent})
        name = self._config.best_by if self._config.best_by in values else "loss"
        sign = -1.0 if name == "loss" else 1.0
        if not self.best or sign * values[name] > sign * self.best[name]:
            self.best = {**values, "step": float(step)}
            if main and self._config.keep == "best":
                self._keep_best()


class StepStateSaver(TrainerCallback):
    """Adds the step's state to each checkpoint that the trainer writes, and seals it."""

    def __init__(self, step: Step, folder: Path) -> None:
        self._step = step
        self._folder = folder

    def best(self) -> dict[str, float]:
        """The best validation so far; empty without one."""
        return {}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Complete and seal what the trainer wrote."""
        checkpoint = self._folder / f"{checkpoints.PREFIX}{state.global_step}"
        kept = {"step": self._step.state_dict(), "best": self.best(), "batch_size": prompts_in_step(args)}
        checkpoints.save_state(checkpoint, kept)
        self._step.world.add(torch.zeros(1))  # a barrier: sealed only after every rank has written
        if state.is_world_process_zero:
            checkpoints.seal(checkpoint)


class Saver(StepStateSaver):
    """Requests checkpoints when due, and removes old ones."""

    def __init__(
        self,
        config: TrainConfig,
        step: Step,
        validation: Validation | None,
        folder: Path,
        steps_per_epoch: int,
    ) -> None:
        super().__init__(step, folder)
        self._config = config
        self._validation = validation
        self._steps_per_epoch = steps_per_epoch

    def best(self) -> dict[str, float]:
        """What validation has found."""
        return self._validation.best if self._validation else {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Request a save from the trainer."""
        last = state.global_step >= state.max_steps
        if due(self._config.save_every, state.global_step, self._steps_per_epoch, last):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Complete the checkpoint, and remove those that are too old."""
        if state.is_world_process_zero:
            copy_processor_of(model, self._folder / f"{checkpoints.PREFIX}{state.global_step}")
        super().on_save(args, state, control)
        if state.is_world_process_zero:
            checkpoints.rotate(self._folder, self._config.keep_checkpoints)


class ProgressBar(TrainerCallback):
    """The bar, or plain lines without a terminal."""

    def __init__(self, title: str, step: Step) -> None:
        self._title = title
        self._step = step
        self._context: Any = None
        self._bar: Any = None
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        self._start = time.perf_counter()
        total, done = state.max_steps, state.global_step
        self._context = console.progress(self._title, total, done=done, trace="loss")
        self._bar = self._context.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance it, with the loss and the mean rate so far."""
        if self._bar is not None:
            rate = self._step.tokens / max(time.perf_counter() - self._start, 1e-9)
            self._bar.advance(1, loss=self._step.last_loss, **{"tokens/s": f"{rate:,.0f}"})

    def close(self) -> None:
        """Close it, whatever happened."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = self._bar = None


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends training after the step in which a signal came."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop if any process was asked to."""
        if self._interrupt.after_step():
            control.should_save = True
            control.should_training_stop = True
