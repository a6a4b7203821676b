"""Two steps of a run in a process of their own: the memory and the time that they took."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.errors import TrainingError
from stillhouse.runs.resolve import Resolved

STEPS = 2
_CHILD = """
import json, resource, sys
import torch
import stillhouse

file, changes = sys.argv[1], json.loads(sys.argv[2])
stillhouse.run(file, **changes)
process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
device = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else process
print("measured", device, flush=True)
"""


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """What two steps took.

    Example: `MeasuredCost(peak_memory=1.21e9, seconds_per_step=0.84)`
    """

    peak_memory: float
    """Bytes: of the process on a CPU, of what torch reserved on a GPU."""
    seconds_per_step: float
    """Of the second step; the first one also pays for what is set up once."""


def measure(resolved: Resolved) -> MeasuredCost:
    """Run the configuration for two optimiser steps in a new process, with export and evaluation.

    Tasks are left out, and at most as many held-out prompts are evaluated as one batch of the engine takes.
    Everything goes into a temporary folder.

    Raises:
        TrainingError: the run failed; the message ends with what it said.
    """
    config = resolved.config
    batch = getattr(config.engine, "batch_size", 1)
    with tempfile.TemporaryDirectory(prefix="stillhouse-measure-") as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(resolved.yaml, encoding="utf-8")
        changes: dict[str, Any] = {
            "output.folder": str(Path(folder) / "run"),
            "output.report": False,
            "train.max_steps": STEPS,
            "train.log_every": 1,
            "train.report_to": [],
            "evaluate.tasks": [],
            "evaluate.limit": min(batch, config.evaluate.limit or batch),
        }
        command = [sys.executable, "-c", _CHILD, str(file), json.dumps(changes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        marked = [line for line in done.stdout.splitlines() if line.startswith("measured ")]
        if done.returncode or not marked:
            said = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise TrainingError(f"--measure: the two steps failed. {said}")
        rows = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = [row["seconds"] for row in map(json.loads, rows) if "seconds" in row and "loss" in row]
        return MeasuredCost(float(marked[-1].split()[1]), float(seconds[-1]))
