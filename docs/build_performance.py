"""Fills the tables of docs/performance.md from benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernel_tables import kernels, without_kernel
from tables import with_tables

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "performance.md"
RESULTS = DOCS.parent / "benchmarks" / "results"


def logit_precision(found: dict[str, Any]) -> str:
    """The largest error of each objective over all spreads of the logits."""
    kinds = dict.fromkeys(row["objective"] for row in found["rows"])
    lines = ["| objective | fp32 logits | bf16 logits |", "|---|--:|--:|"]
    for kind in kinds:
        rows = [row for row in found["rows"] if row["objective"] == kind]
        worst = (max(row[f"{name}_{part}"] for row in rows for part in ("hidden", "head")) for name in PAIR)
        lines.append(f"| {kind} | " + " | ".join(f"{100 * error:.2g}%" for error in worst) + " |")
    return "\n".join([*lines, "", footing(found)])


PAIR = ("fp32", "bf16")


def training_step(found: dict[str, Any]) -> str:
    """Seconds of each variant of a step."""
    lines = ["| a step of 11M <- 42M on one CPU thread | seconds |", "|---|--:|"]
    lines += [f"| {row['variant']} | {row['seconds']:.2f} |" for row in found["rows"]]
    return "\n".join([*lines, "", footing(found)])


def footing(found: dict[str, Any]) -> str:
    """When and how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['date']}, {versions}, CPU, `{found['command']}`."


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "logit_precision": ("logit_precision", logit_precision),
    "training_step": ("training_step", training_step),
    "kernels": ("compiled_kernels", kernels),
    "losses without kernel": ("compiled_kernels", without_kernel),
}
"""The name of a table -> the result that it is made of, and how."""


def pages() -> dict[str, str]:
    """The page by its path below docs/."""
    return with_tables(
        PAGE,
        {
            name: table(json.loads((RESULTS / f"{source}.json").read_text(encoding="utf-8")))
            for name, (source, table) in TABLES.items()
        },
    )
