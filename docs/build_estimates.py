"""Fills the table of docs/estimates.md from benchmarks/results/estimates.json."""

from __future__ import annotations

import json
from pathlib import Path

from tables import with_table

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "estimates.md"
RESULT = DOCS.parent / "benchmarks" / "results" / "estimates.json"


def table() -> str:
    """One row for each measured run."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    names = ("predicted seconds", "measured seconds", "ratio of seconds")
    rows = [
        f"| {row['case']} | {row['student parameters'] / 1e6:.0f}M | {row['estimated GB']:g} | "
        f"{row['measured GB']:g} | {row['ratio']:.2f} | "
        + " | ".join(f"{row[name]:.2f}" if name in row else "–" for name in names)
        + " |"
        for row in found["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    head = [
        "| run | student | estimated (GB) | measured (GB) | ratio | predicted (s) | measured (s) | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    device = found.get("device", "CPU")
    return "\n".join([*head, *rows, "", f"{found['date']}, {versions}, {device}, `{found['command']}`."])


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    return {PAGE.name: with_table(PAGE.read_text(encoding="utf-8"), "estimates", table())}
