"""What a run has come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from stillhouse.files import read_jsonl_leniently, read_object
from stillhouse.runs.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Result:
    """What a run has come to.

    Example: `Result(folder=Path("runs/kd"), state="done", metrics={"rouge_l": 57.1, ...})`
    """

    folder: Path
    """Of the run, or of the chain: weights, log, evaluations, report."""
    state: str
    """"done", or "interrupted" after Ctrl-C or another signal."""
    metrics: dict[str, float]
    """The evaluation of the student after training; the last row of the log if nothing was evaluated."""
    signal: Signals | None = None
    """What has interrupted it."""
    stages: Mapping[str, Result] = field(default_factory=dict)
    """Of a chain: the result of each stage that has come to an end."""


def headline(folder: RunFolder) -> dict[str, float]:
    """The evaluation of the student after training; the last row of the log if nothing was evaluated."""
    after = folder.path / "evaluation" / "student-after.json"
    rows, _ = read_jsonl_leniently(folder.metrics)
    last = read_object(after).get("metrics") or (rows[-1] if rows else {})
    return {name: value for name, value in last.items() if isinstance(value, int | float)}
