"""Fills the table of tasks in docs/evaluation.md from the docstrings of their classes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

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
    text = PAGE.read_text(encoding="utf-8")
    filled = re.sub(
        r"(<!-- tasks -->\n).*?(<!-- end of tasks -->)",
        lambda match: f"{match[1]}{table()}\n{match[2]}",
        text,
        flags=re.DOTALL,
    )
    return {PAGE.name: filled}
