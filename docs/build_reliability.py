"""The table of trials in docs/reliability.md, from the result of benchmarks/reliability.py."""

from __future__ import annotations

import json
from pathlib import Path

from tables import with_table

PAGE = Path(__file__).resolve().parent / "reliability.md"
RESULT = PAGE.parent.parent / "benchmarks" / "results" / "reliability.json"


def table() -> str:
    """One row for each part of the trials."""
    lines = ["| what was tried | right is | trials | failures |", "|---|---|---|---|"]
    for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]:
        kills = f" ({row['kills']:,} kills)" if "kills" in row else ""
        lines.append(f"| {row['tried']} | {row['right']} | {row['trials']:,}{kills} | {row['failures']:,} |")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """The page with the table as it is now."""
    return {PAGE.name: with_table(PAGE.read_text(encoding="utf-8"), "trials", table())}
