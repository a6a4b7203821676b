"""Fills the tables of docs/estimates.md from benchmarks/results/estimates.json and wall_time.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import with_tables

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "estimates.md"
RESULTS = DOCS.parent / "benchmarks" / "results"


def two_steps() -> str:
    """One row for each measured run of two steps."""
    found = _read("estimates")
    names = ("predicted seconds", "measured seconds", "ratio of seconds")
    rows = [
        f"| {row['case']} | {row['student parameters'] / 1e6:.0f}M | {row['estimated GB']:g} | "
        f"{row['measured GB']:g} | {row['ratio']:.2f} | "
        + " | ".join(f"{row[name]:.2f}" if name in row else "–" for name in names)
        + " |"
        for row in found["rows"]
    ]
    head = [
        "| run | student | estimated (GB) | measured (GB) | ratio | predicted (s) | measured (s) | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*head, *rows, "", _how(found)])


def whole_runs() -> str:
    """One row for each run, and one for each phase with the seconds of the processor of each run."""
    found = _read("wall_time")
    runs = found["rows"]
    head = [
        "| run | steps | processor: predicted (s) | measured (s) | ratio "
        "| clock: predicted (s) | measured (s) | ratio | share of the processor |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rows = [
        f"| {run['case']} | {run['steps']} | {_compared(run['processor'])} | {_compared(run['clock'])} | "
        f"{_shares(run['share of the processor'])} |"
        for run in runs
    ]
    by_phase = [
        "| processor, predicted (measured), in s | " + " | ".join(run["case"] for run in runs) + " |",
        "|---|" + "--:|" * len(runs),
    ]
    phases = [
        f"| {phase} | " + " | ".join(_pair(run["processor"]["phases"][phase]) for run in runs) + " |"
        for phase in runs[0]["processor"]["phases"]
    ]
    return "\n".join([*head, *rows, "", *by_phase, *phases, "", _how(found)])


def _compared(one: Mapping[str, Any]) -> str:
    return f"{_range(one['predicted'], 1)} | {one['measured']:.1f} | {_range(one['ratio'], 2)}"


def _shares(one: Mapping[str, float]) -> str:
    return f"{one['two steps']:.0%}, then {one['run']:.0%}"


def _pair(one: Mapping[str, Any]) -> str:
    return f"{_range(one['predicted'], 1)} ({one['measured']:.1f})"


def _range(ends: Sequence[float], digits: int) -> str:
    low, high = (f"{end:.{digits}f}" for end in ends)
    return low if low == high else f"{low} to {high}"


def _how(found: Mapping[str, Any]) -> str:
    """When, with what and by which command it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['date']}, {versions}, {found.get('device', 'CPU')}, `{found['command']}`."


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    return with_tables(PAGE, {"estimates": two_steps(), "whole runs": whole_runs()})
