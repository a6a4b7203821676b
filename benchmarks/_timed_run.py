"""`stillhouse run RUN.yaml`, and what each of its phases took.

    python benchmarks/_timed_run.py RUN.yaml TIMES.json

TIMES.json has seconds by phase, by the clock and of the processor, and those of the whole run from when its
configuration was read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from stillhouse.commands import main
from stillhouse.files import write_json
from stillhouse.runs.run_watch import RunWatch, minus, plus


def timed(file: str, times: Path) -> None:
    """Run, and write what it took."""
    watch = RunWatch()
    with watch.on():
        command, sys.argv = sys.argv, ["stillhouse", "run", file]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise
        finally:
            sys.argv = command
    names = ("loading", "evaluation", "export", "report", "checkpoints", "validation")
    write_json(
        times,
        {
            "run": watch.whole.together(),
            **{name: watch.phases.together(name) for name in names},
            "generation": watch.writing.spent,
            "training": minus(plus(*watch.training.steps), watch.writing.spent),
        },
    )


if __name__ == "__main__":
    timed(sys.argv[1], Path(sys.argv[2]))
