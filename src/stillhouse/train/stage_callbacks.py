"""Callbacks around the trainer of another library: a metrics log, sealed checkpoints, progress."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stillhouse import console
from stillhouse.files import append_jsonl, read_jsonl, write_jsonl
from stillhouse.train import checkpoints
from stillhouse.train.config import Every, due
from stillhouse.train.step import SingleProcess, World


@dataclass
class LibraryStep:
    """What `Interrupt` asks of a step, for steps that another library takes: none can be given up."""

    world: World
    generating: bool = False

    @classmethod
    def alone(cls) -> LibraryStep:
        """Of the only process."""
        return cls(SingleProcess())

    def give_up(self) -> None:
        """Nothing to go back to."""


class StageLog(TrainerCallback):
    """Writes the rows of a trainer's log to a metrics file, as `MetricsLog` does."""

    def __init__(self, path: Path, after: int) -> None:
        """A log that goes on after an optimiser step, -1 for a new one.

        Args:
            path: of the metrics file; rows after that step are removed.
            after: the step.
        """
        self._path = path
        self._last = time.perf_counter()
        rows = read_jsonl(path)
        kept = [row for row in rows if row["step"] <= after]
        if len(kept) < len(rows) or not rows:
            write_jsonl(path, kept)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last step is always logged."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Append one row."""
        if logs is None or "learning_rate" not in logs or not state.is_world_process_zero:
            return
        now = time.perf_counter()
        values = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        row = {"phase": "train", "step": state.global_step, **values, "seconds": now - self._last}
        append_jsonl(self._path, row)
        self._last = now


class StageSaver(TrainerCallback):
    """Requests checkpoints when due, seals them and removes old ones."""

    def __init__(self, every: Every, keep: int, folder: Path, steps_per_epoch: int) -> None:
        self._every, self._keep = every, keep
        self._folder = folder
        self._steps_per_epoch = steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Request a save from the trainer."""
        if due(self._every, state.global_step, self._steps_per_epoch, state.global_step >= state.max_steps):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal what the trainer wrote."""
        if state.is_world_process_zero:
            checkpoints.seal(self._folder / f"{checkpoints.PREFIX}{state.global_step}")
            checkpoints.rotate(self._folder, self._keep)


class StageProgress(TrainerCallback):
    """The bar, or plain lines without a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._context: Any = None
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        self._context = console.progress(self._title, state.max_steps, done=state.global_step, trace="loss")
        self._bar = self._context.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance it, with the newest loss of the log."""
        newest = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None)
        self._bar.advance(1, **({} if newest is None else {"loss": newest}))

    def close(self) -> None:
        """Close it, whatever happened."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = self._bar = None
