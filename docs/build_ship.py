"""The tables in docs/ship.md: a function for each, in TABLES by the name that stands in the page."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tables import with_tables

PAGE = Path(__file__).resolve().parent / "ship.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results"


def _rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
    return found


def _lines(head: list[str], rows: list[list[str]]) -> str:
    rule = f"|---{'|---:' * (len(head) - 1)}|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(cells)} |" for cells in rows)])


def quantised(name: str = "quantised.json") -> str:
    """The model before, and each way quantised and recovered."""
    measures = {"kl_to_teacher": (1, 5), "top1_agreement": (100, 1), "loss": (1, 3), "rouge_l": (1, 1)}
    head = ["weights", "KL to the model before", "same first choice, %", "loss", "ROUGE-L"]
    rows = []
    for row in _rows(name):
        weights, _, way = row["weights"].partition(", ")
        if way == "qat" and row["state"] == "quantised":
            continue  # rounded alike
        recovered = {"adapters": "recovered by adapters", "qat": "recovered by QAT"}
        cells = [f"{weights}, {recovered[way] if row['state'] == 'recovered' else row['state']}"]
        for name, (factor, digits) in measures.items():
            half = row.get(f"{name}_half")
            shown = name in row and f"{row[name] * factor:.{digits}f} ± {half * factor:.{digits}f}"
            cells.append(shown or "–")
        rows.append(cells)
    return _lines(head, rows)


def drafts() -> str:
    """By task: acceptance, block efficiency and speed-up, before and after each objective."""
    rows = _rows("drafts.json")
    head = ["task", "draft", "acceptance rate", "block efficiency", "speed-up"]
    names = ("acceptance_rate", "block_efficiency", "speed_up")
    tasks = dict.fromkeys(row["task"] for row in rows)
    ordered = [row for task in tasks for row in rows if row["task"] == task]
    cells = [
        [row["task"], row["state"], *(f"{row[name]:.2f}" if name in row else "–" for name in names)]
        for row in ordered
    ]
    return _lines(head, cells)


def gammas() -> str:
    """Acceptance and block efficiency by gamma, before and after each objective."""
    curves = {row["state"]: row["by_gamma"] for row in _rows("drafts.json") if "by_gamma" in row}
    head = ["gamma", *(str(point["gamma"]) for point in curves["before"])]
    names = {"acceptance_rate": "acceptance rate", "block_efficiency": "block efficiency"}
    return _lines(
        head,
        [
            [f"{title}, {state}", *(f"{point[name]:.2f}" for point in points)]
            for name, title in names.items()
            for state, points in curves.items()
        ],
    )


def sweep() -> str:
    """Means over the seeds of each method."""
    measures = {
        "rouge_l": (1, 1), "kl_to_teacher": (1, 3), "top1_agreement": (100, 1), "seconds": (1, 0),
    }  # fmt: skip
    head = ["method", "ROUGE-L", "KL to the teacher", "same first choice, %", "seconds of the run"]
    return _lines(
        head,
        [
            [
                row["method"],
                *(
                    f"{row[name] * factor:.{digits}f} ± {row[f'{name}_half'] * factor:.{digits}f}"
                    for name, (factor, digits) in measures.items()
                ),
            ]
            for row in _rows("sweeps.json")
        ],
    )


def teacher_tokens() -> str:
    """What the teacher wrote and read for a sweep, with and without sharing."""
    found = json.loads((RESULTS / "sweeps.json").read_text(encoding="utf-8"))
    alone, shared = (found[f"teacher tokens, {name}"] for name in ("not shared", "shared"))
    rows = [[name, alone[name], shared[name]] for name in alone]
    rows.append(["together", sum(alone.values()), sum(shared.values())])
    return _lines(
        ["tokens of the teacher", "each run alone", "shared", "saved"],
        [[name, f"{one:,}", f"{other:,}", f"{1 - other / one:.0%}"] for name, one, other in rows],
    )


TABLES = {
    "quantised": quantised,
    "quantised smollm2": partial(quantised, "quantised_smollm2.json"),
    "drafts": drafts,
    "gammas": gammas,
    "sweep": sweep,
    "teacher tokens": teacher_tokens,
}


def pages() -> dict[str, str]:
    """The page with every table that stands in it."""
    return with_tables(PAGE, {name: table() for name, table in TABLES.items()})
