"""Stage of gpu.py: the test-suite on this machine, and the names of the tests that fail."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _gpu_models import Place

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("fused", "models", "laws", "train", "recipes", "objectives", "engines", "teachers", "runs")
"""Folders in which a GPU can matter most."""
SMALL = "tests/core/test_journal.py"
PROCESSES = 8


def files() -> list[str]:
    """All test files, those of `FIRST` before the others."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    order = {name: number for number, name in enumerate(FIRST)}
    ranked = sorted(found, key=lambda file: order.get(file.relative_to(ROOT / "tests").parts[0], len(FIRST)))
    return [str(file.relative_to(ROOT)) for file in ranked]


def stage(place: Place) -> Iterator[dict[str, Any]]:
    """A row for each file as it ends; those that the stage's limit cuts off have none."""
    todo: queue.Queue[str] = queue.Queue()
    for name in [SMALL] if place.small else files():
        todo.put(name)
    done: queue.Queue[dict[str, Any]] = queue.Queue()
    count = todo.qsize()

    def work() -> None:
        while True:
            try:
                name = todo.get_nowait()
            except queue.Empty:
                return
            done.put(outcome(name))

    for _ in range(min(PROCESSES, os.cpu_count() or 1)):
        threading.Thread(target=work, daemon=True).start()
    for _ in range(count):
        yield done.get()


def outcome(name: str) -> dict[str, Any]:
    """One file in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--tb=line", name]
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    failed = [line.split(" ", 1)[1][:400] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    marks = Counter(mark for line in lines if line.endswith("%]") for mark in line.split(" ")[0])
    row: dict[str, Any] = {"file": name, "passed": marks["."], "failed": failed}
    if done.returncode not in (0, 1, 5):
        row["broke_off"] = (done.stdout + done.stderr)[-400:]
    return row
