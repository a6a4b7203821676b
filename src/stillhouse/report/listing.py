"""One line for each run: where it stands, what it is, how good it is so far."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.console import Table, duration, make_table
from stillhouse.console.format import MISSING, age, compact_number, is_number
from stillhouse.report.metrics import main_metric, metric_info
from stillhouse.report.record import RunRecord, load_runs, status_of
from stillhouse.report.systems import role_of


@dataclass(frozen=True, slots=True)
class Score:
    """The best figure of a run. Example: `Score("rouge_l", 57.1, "validation", step=150)`"""

    metric: str
    value: float
    on: str
    """The task of an evaluation, or "validation"."""
    step: int | None = None
    """The step of a validation; None for the finished student."""
    prompts: int | None = None
    """The sample size, where the evaluation says it."""


@dataclass(frozen=True, slots=True)
class RunSummary:
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


def runs_table(lines: Sequence[RunSummary]) -> Table:
    """The runs as a table for people."""
    headings = ("run", "state", "method", "steps", "best score", "started", "took")
    rows = [
        (
            line.folder,
            line.state,
            line.method or None,
            f"{line.step:,}" + (f"/{line.max_steps:,}" if line.max_steps else ""),
            _score_text(line.score),
            age(line.age_seconds),
            duration(line.seconds),
        )
        for line in lines
    ]
    return make_table(headings, rows, drop_columns=True)


def list_runs(folders: Sequence[Path], now: datetime.datetime | None = None) -> list[RunSummary]:
    """The runs in the folders, oldest first within each.

    Raises:
        DataError: a folder does not exist or holds no run.
    """
    now = now or datetime.datetime.now(datetime.UTC)
    return [_line(run, now) for run in load_runs(folders, rows="none")]


def _line(run: RunRecord, now: datetime.datetime) -> RunSummary:
    state, message = status_of(run.state)
    train = run.metrics("train")
    limit = run.state.get("max_steps") or (
        run.config["train.max_steps"].value if "train.max_steps" in run.config else None
    )
    started = str(run.state.get("started") or "") or None
    seconds = run.state.get("seconds")
    return RunSummary(
        folder=str(run.folder),
        name=run.name,
        state=state,
        method=run.recipe or run.does or _objective(run),
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
            main = main_metric([result.metrics])
            if main is not None:
                count = result.settings.get("prompts")
                return Score(
                    main.name,
                    float(result.metrics[main.name]),
                    result.task or "held-out prompts",
                    prompts=int(count) if is_number(count) and math.isfinite(count) else None,
                )
    rows = run.metrics("valid")
    for name in ("rouge_l", "loss"):
        found = [row for row in rows if is_number(row.get(name)) and math.isfinite(row[name])]
        if found:
            best = (max if metric_info(name).better == "higher" else min)(found, key=lambda row: row[name])
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
        return MISSING
    known = metric_info(score.metric)
    where = f"validation, step {compact_number(score.step)}" if score.step is not None else score.on
    if score.prompts is not None and score.on == "held-out prompts":
        where = f"{score.prompts:,} held-out prompts"
    elif score.prompts is not None:
        where += f", {score.prompts:,} prompts"
    return f"{known.label} {known.show(score.value)} ({where})"
