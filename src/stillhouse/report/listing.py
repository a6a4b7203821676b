"""One line for each run: where it stands, what it is, how good it is so far."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.report.measures import compact, is_number, main_measure, measure
from stillhouse.report.record import RunRecord, find_runs, load_run
from stillhouse.report.state import status_of
from stillhouse.report.systems import role_of


@dataclass(frozen=True, slots=True)
class Score:
    """The best figure of a run. Example: `Score("rouge_l", 57.1, "validation", step=150)`"""

    measure: str
    value: float
    on: str
    """The task of an evaluation, or "validation"."""
    step: int | None = None
    """The step of a validation; None for the finished student."""


@dataclass(frozen=True, slots=True)
class RunLine:
    """What a list of runs says about one."""

    folder: str
    name: str
    state: str
    method: str
    step: int
    max_steps: int | None
    score: Score | None
    started: str | None
    age_seconds: float | None
    """Since the run was started."""
    seconds: float | None
    """How long it took; None while it runs."""
    message: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """For `console.table`, in the order of HEADINGS."""
        steps = f"{self.step:,}" + (f"/{self.max_steps:,}" if self.max_steps else "")
        return (
            self.folder,
            self.state,
            self.method or "–",
            steps,
            _score_text(self.score),
            age_text(self.age_seconds),
            console.duration(self.seconds) if self.seconds is not None else "–",
        )


HEADINGS = ("run", "state", "method", "steps", "best score", "started", "took")


def list_runs(folders: Sequence[Path], now: datetime.datetime | None = None) -> list[RunLine]:
    """The runs in the folders, oldest first within each.

    Raises:
        DataError: a folder does not exist or holds no run.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    return [_line(load_run(folder, answers=False), now) for folder in find_runs(folders)]


def _line(run: RunRecord, now: datetime.datetime) -> RunLine:
    state, message = status_of(run.state)
    train = run.metrics("train")
    limit = run.state.get("max_steps") or (
        run.config["train.max_steps"].value if "train.max_steps" in run.config else None
    )
    started = str(run.state.get("started") or "") or None
    seconds = run.state.get("seconds")
    return RunLine(
        folder=str(run.folder),
        name=run.name,
        state=state,
        method=run.recipe or _objective(run),
        step=int(train[-1]["step"]) if train else 0,
        max_steps=int(limit) if is_number(limit) and limit > 0 else None,
        score=best_score(run),
        started=started,
        age_seconds=_age(started, now),
        seconds=float(seconds) if is_number(seconds) else None,
        message=message,
    )


def best_score(run: RunRecord) -> Score | None:
    """The main measure of the finished student, or else the best validation so far."""
    for result in run.evaluations:
        if role_of(result.system) == "after":
            main = main_measure([result.metrics])
            if main is not None:
                return Score(main.name, float(result.metrics[main.name]), result.task or "held-out prompts")
    rows = run.metrics("valid")
    for name in ("rouge_l", "loss"):
        found = [row for row in rows if is_number(row.get(name)) and math.isfinite(row[name])]
        if found:
            best = (max if measure(name).better == "higher" else min)(found, key=lambda row: row[name])
            return Score(name, float(best[name]), "validation", int(best["step"]))
    return None


def _objective(run: RunRecord) -> str:
    entry = run.config.get("objective.kind")
    return str(entry.value) if entry else ""


def _age(started: str | None, now: datetime.datetime) -> float | None:
    if started is None:
        return None
    try:
        began = datetime.datetime.fromisoformat(started)
    except ValueError:
        return None
    return (now - (began if began.tzinfo else began.replace(tzinfo=datetime.UTC))).total_seconds()


def _score_text(score: Score | None) -> str:
    if score is None:
        return "–"
    known = measure(score.measure)
    where = f"validation, step {compact(score.step)}" if score.step is not None else score.on
    return f"{known.label} {known.show(score.value)} ({where})"


def age_text(seconds: float | None) -> str:
    """`just now`, `5 min ago`, `3 h ago`, `12 days ago`; a dash where unknown."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return "just now"
    for size, unit in ((86400, "day"), (3600, "h"), (60, "min")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (unit == 'day' and count > 1)} ago"
    return "–"
