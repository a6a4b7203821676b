"""Runs configurations for a few steps in this process, which is made for that, and prints what they took.

    python -m stillhouse.runs.measured_steps RUN.yaml CHANGES.json

CHANGES.json is a list of overrides, one mapping a run; the answer is a line of JSON with one mapping a run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "measured "
"""Begins the line with the answer."""


def main(file: str, changes: str) -> None:
    """Run each; print the answer."""
    found = [measured(file, one) for one in json.loads(Path(changes).read_text(encoding="utf-8"))]
    sys.stdout.write(MARK + json.dumps(found) + "\n")


def measured(file: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What one run took: its peak memory so far, the seconds of its last step, and those of all else."""
    import torch

    from stillhouse.runs import execute
    from stillhouse.runs.api import run
    from stillhouse.train.step import Step
    from stillhouse.train.trainer import StepTrainer

    watch, phases, whole = StepWatch(), Stopwatch(), Stopwatch()
    with (
        watch.on(Step),
        replaced(execute, check_length=lambda *_: []),  # what fits the whole run need not fit two steps
        phases.on(execute, assemble="loading", evaluate_system="evaluations", export="export"),
        phases.on(execute, _write_report="report"),
        phases.on(StepTrainer, _save_checkpoint="checkpoint"),
        whole.on(execute, execute="run"),
    ):
        result = run(file, **changes)
    took = whole.together()
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if row["phase"] == "train"]
    validations = [row["seconds/evaluate"] for row in rows if row["phase"] == "valid"]
    last = steps[-1]
    named = phases.together() + sum(row["seconds"] for row in steps) + sum(validations)
    return {
        "memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_of_process(),
        "took": took,
        "tokens": watch.tokens,
        "seconds": last["seconds"],
        "processor": watch.processor,
        "of_tokens": {
            name: last[f"tokens/{name}"] for name in ("student", "generate") if f"tokens/{name}" in last
        },
        "threads": torch.get_num_threads(),
        "phases": {
            name.removeprefix("seconds/"): value
            for name, value in last.items()
            if name.startswith("seconds/")
        },
        "run": {
            "loading": phases.longest("loading"),
            "first_step": steps[0]["seconds"] - steps[0].get("seconds/generate", 0.0),
            "last_step": last["seconds"] - last.get("seconds/generate", 0.0),
            "teacher": last.get("seconds/teacher", 0.0),
            "generation": sum(row.get("seconds/generate", 0.0) for row in steps),
            "generated": sum(row.get("tokens/generate", 0.0) for row in steps),
            "checkpoint": phases.longest("checkpoint"),
            "validation": max(validations, default=None),
            "export": phases.longest("export"),
            "report": phases.longest("report"),
            "rest": max(0.0, took - named),
            "evaluations": _evaluations(result.folder / "evaluation", phases.of("evaluations")),
        },
    }


def _evaluations(folder: Path, seconds: Sequence[float]) -> list[dict[str, Any]]:
    """Of each system what its evaluation took, and what it wrote, in the order of the evaluations."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = []
    for path, took in zip(files, seconds, strict=False):  # without held-out prompts there are no files
        facts = json.loads(path.read_text(encoding="utf-8"))
        responses = facts["settings"]["prompts"] * len(facts["settings"]["seeds"])
        tokens = responses * facts["metrics"]["mean_length"]
        found.append({"seconds": took, "responses": responses, "tokens": tokens})
    return found


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
    """Seconds by the clock of each call of some functions.

    Example:
        >>> with watch.on(execute, export="export"):
        ...     run("run.yaml")
        >>> watch.longest("export")
    """

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def of(self, name: str) -> Sequence[float]:
        """Of each call."""
        return self._seconds.get(name, [])

    def together(self) -> float:
        """Of all calls of all functions."""
        return sum(map(sum, self._seconds.values()))

    def longest(self, name: str) -> float | None:
        """Of the longest call; None if there was none."""
        return max(self.of(name), default=None)

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
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._seconds.setdefault(name, []).append(time.perf_counter() - began)

        return timed


def peak_of_process() -> int:
    """The most bytes that this process had resident.

    On Linux not by `getrusage`, which begins with what the process had that started this one.
    """
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
        peak = next((line[1] for line in lines if line[0] == "VmHWM:"), None)
        if peak is not None:
            return int(peak) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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


if __name__ == "__main__":
    main(*sys.argv[1:])
