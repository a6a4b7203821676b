"""Fills the table of docs/teachers.md from benchmarks/results/several_teachers.json."""

from __future__ import annotations

import json
from pathlib import Path

from tables import with_table

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "teachers.md"
RESULT = DOCS.parent / "benchmarks" / "results" / "several_teachers.json"


def table() -> str:
    """One row for each system: exact match on each half and on both, with standard errors."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = [
        "| "
        + " | ".join([row["system"], *(f"{row[one]:g} ± {row[f'{one}_error']:g}" for one in SHOWN)])
        + " |"
        for row in found["rows"]
    ]
    head = ["| exact match (%) | left | right | both |", "|---|--:|--:|--:|"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    seeds = len(found["seeds"])
    note = (
        f"Means over {seeds} seeds with standard errors; {found['date']}, {versions}, `{found['command']}`."
    )
    return "\n".join([*head, *rows, "", note])


SHOWN = ("left", "right", "both")


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    return {PAGE.name: with_table(PAGE.read_text(encoding="utf-8"), "several teachers", table())}
