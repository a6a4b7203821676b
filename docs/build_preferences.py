"""The tables in docs/preferences.md: rankers from their classes, results from the benchmark."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from tables import with_tables

from stillhouse.evaluate.rankers import REGISTRY as RANKERS

PAGE = Path(__file__).resolve().parent / "preferences.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results" / "preferences.json"
OF_TWO_TEACHERS = RESULTS.with_name("preference_distillation.json")
MEASURES = {
    "preference_accuracy": ("preference accuracy, %", 100),
    "reward_accuracy": ("reward accuracy, %", 100),
    "rouge_l": ("ROUGE-L", 1),
    "kl_to_reference": ("KL to the distilled student, nats per token", 1),
    "mean_length": ("tokens", 1),
}


def rankers() -> str:
    """One row for each ranker: its options with their defaults, and what it scores by."""
    lines = ["| ranker | options | what it does |", "|---|---|---|"]
    for kind in RANKERS.kinds():
        part = RANKERS[kind]
        options = [_option(name, info) for name, info in part.model_fields.items() if name != "kind"]
        words = " ".join((inspect.getdoc(part) or "").split("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| `{kind}` | {', '.join(options)} | {words} |")
    return "\n".join(lines)


def results(path: Path = RESULTS, reference: str = "distilled student") -> str:
    """The rows of a benchmark, whose KL is to that model."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    titles = [title.replace("distilled student", reference) for title, _ in MEASURES.values()]
    head = ["system", "seeds", *titles]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (1 + len(MEASURES))}|"]
    for row in rows:
        cells = [_cell(row, name, factor) for name, (_, factor) in MEASURES.items()]
        lines.append(f"| {row['system']} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_two_teachers() -> str:
    """The rows of the benchmark with two teachers."""
    return results(OF_TWO_TEACHERS, "student")


TABLES = {
    "rankers": rankers,
    "results": results,
    "results with two teachers": of_two_teachers,
}


def pages() -> dict[str, str]:
    """The page with its tables as they are now."""
    return with_tables(PAGE, {name: table() for name, table in TABLES.items()})


def _option(name: str, info: Any) -> str:
    return f"`{name}`" if info.is_required() or info.default is None else f"`{name}: {info.default}`"


def _cell(row: dict[str, Any], name: str, factor: int) -> str:
    if name not in row:
        return ""
    digits = 3 if name == "kl_to_reference" else 1
    error = f" ± {factor * row[f'{name}_se']:.{digits}f}" if row["seeds"] > 1 else ""
    return f"{factor * row[name]:.{digits}f}{error}"
