"""Runs configurations for a few steps in this process, which is made for that, and prints what they took.

    python -m stillhouse.runs.measured_steps RUN.yaml CHANGES.json

CHANGES.json is a list of overrides, one mapping a run; the answer is a line of JSON with one mapping a run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.runs.run_watch import CLOCK, KERNEL, PROCESSOR, RunWatch, Spent, minus, replaced

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

    watch = RunWatch()
    with (
        replaced(execute, check_length=lambda *_: []),  # what fits the whole run need not fit two steps
        watch.on(),
    ):
        result = run(file, **changes)
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if row["phase"] == "train"]
    last = steps[-1]
    evaluated = _evaluated(result.folder / "evaluation")
    return {
        "memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_of_process(),
        "tokens": watch.steps.tokens,
        "seconds": last["seconds"],
        "processor": watch.steps.processor,
        "of_tokens": {
            name: last[f"tokens/{name}"] for name in ("student", "generate") if f"tokens/{name}" in last
        },
        "threads": torch.get_num_threads(),
        "phases": {
            name.removeprefix("seconds/"): value
            for name, value in last.items()
            if name.startswith("seconds/")
        },
        "took": watch.whole.together(),
        "run": _taken(watch, steps, evaluated, CLOCK),
        "run_processor": _taken(watch, steps, evaluated, PROCESSOR),
    }


def _taken(
    watch: RunWatch, rows: Sequence[dict[str, Any]], evaluated: Sequence[dict[str, Any]], by: int
) -> dict[str, Any]:
    """The fields of `MeasuredPhases` but `starting`, by the clock or of the processor."""
    phases, whole = watch.phases, watch.whole.together()[by]
    steps = [spent[by] for spent in watch.training.steps]
    writings = {name: writing.fields(by) for name, writing in watch.writing.by_source.items()}
    evaluations = phases.of("evaluation")
    return {
        "loading": phases.longest("loading", by),
        "steps": [
            _step(row, minus(taken, written), by)
            for row, taken, written in zip(rows, watch.training.steps, watch.training.writing, strict=True)
        ],
        "writings": writings,
        "checkpoint": phases.longest("checkpoints", by),
        "validation": phases.longest("validation", by),
        "export": phases.longest("export", by),
        "report": phases.longest("report", by),
        "rest": max(0.0, whole - phases.together()[by] - sum(steps)),
        "evaluations": [
            {**facts, "seconds": spent[by]}
            for facts, spent in zip(evaluated, evaluations, strict=False)  # no held-out prompts, no files
        ],
    }


def _step(row: dict[str, Any], spent: Spent, by: int) -> dict[str, Any]:
    """The fields of `MeasuredStep`, from its row of the log, with seconds by the clock, and what it took."""
    over_clock, over_processor = (spent[by] / max(1e-9, spent[whole]) for whole in (CLOCK, PROCESSOR))
    return {
        "seconds": spent[by],
        "teacher": row.get("seconds/teacher", 0.0) * over_clock,
        "optimiser": row.get("seconds/optimiser", 0.0) * over_clock,
        "kernel": spent[KERNEL] * over_processor,
        "tokens": row["tokens/student"],
        "by_student": row.get("responses/student", 0.0) * row["sequences"],
    }


def _evaluated(folder: Path) -> list[dict[str, Any]]:
    """What each system wrote for its evaluation, in the order of the evaluations."""
    found = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        facts = json.loads(path.read_text(encoding="utf-8"))
        responses = facts["settings"]["prompts"] * len(facts["settings"]["seeds"])
        found.append({"responses": responses, "tokens": responses * facts["metrics"]["mean_length"]})
    return found


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


if __name__ == "__main__":
    main(*sys.argv[1:])
