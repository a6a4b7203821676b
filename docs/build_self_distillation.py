"""Fills the table of docs/self-distillation.md from benchmarks/results/self_distillation.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import with_table

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "self-distillation.md"
RESULT = DOCS.parent / "benchmarks" / "results" / "self_distillation.json"


def score(row: dict[str, Any], kind: str) -> str:
    """The mean with its standard error, where there is one."""
    error = row[f"rouge_l_{kind}_error"]
    return f"{row[f'rouge_l_{kind}']:.1f}" + ("" if error is None else f" ± {error:.1f}")


def table() -> str:
    """One row for each method."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = [f"| {row['method']} | {score(row, 'new')} | {score(row, 'old')} |" for row in found["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    head = ["| method | coffee shops (new) | pubs and restaurants (old) |", "|---|--:|--:|"]
    return "\n".join([*head, *rows, "", f"{found['date']}, {versions}, `{found['command']}`."])


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    return {PAGE.name: with_table(PAGE.read_text(encoding="utf-8"), "self-distillation", table())}
