"""Fills the table of tasks in docs/evaluation.md from the docstrings of their classes."""

from __future__ import annotations

import inspect
from pathlib import Path

from tables import with_table

from stillhouse.evaluate.tasks import REGISTRY

PAGE = Path(__file__).resolve().parent / "evaluation.md"


def table() -> str:
    """One row for each task: its kind and the first paragraph of its docstring."""
    rows = []
    for kind in REGISTRY.kinds():
        summary = (inspect.getdoc(REGISTRY[kind]) or "").split("\n\n", 1)[0]
        rows.append(f"| `{kind}` | {' '.join(summary.split()).removesuffix('.')} |")
    return "\n".join(["| kind | what it measures |", "|---|---|", *rows])


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    return {PAGE.name: with_table(PAGE.read_text(encoding="utf-8"), "tasks", table())}
