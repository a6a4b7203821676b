"""`stillhouse run RUN.yaml`, and what each of its phases took.

    python benchmarks/_timed_run.py RUN.yaml TIMES.json

TIMES.json has seconds by the clock by phase, and of the whole run from when its configuration was read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stillhouse.commands import main
from stillhouse.files import write_json
from stillhouse.runs import execute
from stillhouse.runs.measured_steps import Stopwatch
from stillhouse.train.trainer import StepTrainer


def timed(file: str, times: Path) -> None:
    """Run, and write what it took."""
    watch, whole = Stopwatch(), Stopwatch()
    with (
        watch.on(execute, assemble="loading", evaluate_system="evaluation", export="export"),
        watch.on(execute, _write_report="report"),
        watch.on(StepTrainer, _save_checkpoint="checkpoints"),
        whole.on(execute, execute="run"),
    ):
        command, sys.argv = sys.argv, ["stillhouse", "run", file]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise
        finally:
            sys.argv = command
    (metrics,) = Path(file).parent.rglob("metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    names = ("loading", "evaluation", "export", "report", "checkpoints")
    between = sum(watch.of("checkpoints")[:-1])  # which the next row of the metrics counts as its own
    write_json(
        times,
        {
            "run": sum(whole.of("run")),
            **{name: sum(watch.of(name)) for name in names},
            "training": sum(row["seconds"] for row in rows if row["phase"] == "train") - between,
            "validation": sum(row["seconds/evaluate"] for row in rows if row["phase"] == "valid"),
        },
    )


if __name__ == "__main__":
    timed(sys.argv[1], Path(sys.argv[2]))
