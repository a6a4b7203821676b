"""Runs configurations for a few steps in this process, which is made for that, and prints what they took.

    python -m stillhouse.runs.measured_steps RUN.yaml CHANGES.json

CHANGES.json is a list of overrides, one mapping a run; the answer is a line of JSON with one mapping a run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

MARK = "measured "
"""Begins the line with the answer."""


def main(file: str, changes: str) -> None:
    """Run each; print the answer."""
    found = [measured(file, one) for one in json.loads(Path(changes).read_text(encoding="utf-8"))]
    sys.stdout.write(MARK + json.dumps(found) + "\n")


def measured(file: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What one run took: its peak memory so far, and the seconds of its last step."""
    import torch

    from stillhouse.runs.api import run
    from stillhouse.train.step import Step

    watch = StepWatch()
    with watch.on(Step):
        result = run(file, **changes)
    rows = map(json.loads, (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    last = [row for row in rows if row["phase"] == "train"][-1]
    return {
        "memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_of_process(),
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
    }


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
        from contextlib import contextmanager

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

        @contextmanager
        def watching() -> Any:
            step.prepare, step.loss, step.finish = watched_prepare, watched_loss, watched_finish
            try:
                yield
            finally:
                step.prepare, step.loss, step.finish = prepare, loss, finish

        return watching()


if __name__ == "__main__":
    main(*sys.argv[1:])
