"""The table of trials in docs/reliability.md, from the result of benchmarks/reliability.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    text = PAGE.read_text(encoding="utf-8")
    pattern = r"(<!-- trials table -->\n).*?(<!-- end of table -->)"
    return {
        PAGE.name: re.sub(pattern, lambda found: f"{found[1]}{table()}\n{found[2]}", text, flags=re.DOTALL)
    }
