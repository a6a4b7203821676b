"""Fills the table of docs/estimates.md from benchmarks/results/estimates.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "estimates.md"
RESULT = DOCS.parent / "benchmarks" / "results" / "estimates.json"


def table() -> str:
    """One row for each measured run."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = [
        f"| {row['case']} | {row['student parameters'] / 1e6:.0f}M | {row['estimated GB']:g} | "
        f"{row['measured GB']:g} | {row['ratio']:.2f} |"
        for row in found["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    head = ["| run | student | estimated (GB) | measured (GB) | ratio |", "|---|--:|--:|--:|--:|"]
    return "\n".join([*head, *rows, "", f"{found['date']}, {versions}, CPU, `{found['command']}`."])


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    text = PAGE.read_text(encoding="utf-8")
    filled = re.sub(
        r"(<!-- estimates -->\n).*?(<!-- end of estimates -->)",
        lambda match: f"{match[1]}{table()}\n{match[2]}",
        text,
        flags=re.DOTALL,
    )
    return {PAGE.name: filled}
