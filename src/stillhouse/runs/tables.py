"""Tables of results in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillhouse import console
from stillhouse.report import summary_table

COLUMNS = {
    "rouge_l": "ROUGE-L",
    "kl_to_teacher": "KL to teacher",
    "top1_agreement": "top-1 agreement",
    "mean_length": "tokens/answer",
    "parameters": "parameters",
    "tokens_per_second": "tokens/s",
}


def show_systems(folders: Sequence[Path], title: str | None = None) -> None:
    """Print one row for each system of the runs: ROUGE-L, KL to the teacher, size, speed."""
    rows = summary_table(folders)
    console.table(
        ("system", *COLUMNS.values()),
        [(row["system"], *(_shown(name, row.get(name)) for name in COLUMNS)) for row in rows],
        title=title,
    )


def _shown(name: str, value: float | None) -> float | int | None:
    return int(value) if value is not None and name == "parameters" else value
