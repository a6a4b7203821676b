"""What was dropped and why: from the data sets, and by the filters of rounds of responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.console.format import compact_number, is_number, setting_text
from stillhouse.report.record import RunRecord
from stillhouse.report.systems import role_of

EXAMPLE_FIELDS = ("source", "filter", "reason", "detail", "prompt", "response")


@dataclass(frozen=True, slots=True)
class CuratedSource:
    """One source of one round: who generated, what was dropped for what reason, how much was resampled."""

    round: str
    source: str
    generated_by: str
    prompts: str
    kept: str
    dropped: list[tuple[str, str]]
    dropped_at_first: list[tuple[str, str]]
    resampled: str


@dataclass(frozen=True, slots=True)
class CuratedRun:
    """The rounds of one run, the filters in their order, and examples of what was dropped."""

    name: str
    filters: list[str]
    sources: list[CuratedSource]
    examples: list[dict[str, str]]


def curated_runs(runs: Sequence[RunRecord]) -> list[CuratedRun]:
    """The runs whose rounds of responses passed filters."""
    return [found for run in runs if (found := _of_run(run)) is not None]


def _of_run(run: RunRecord) -> CuratedRun | None:
    rounds = run.curation.get("rounds")
    known = [one for one in rounds.values() if isinstance(one, dict)] if isinstance(rounds, dict) else []
    if not known:
        return None
    sources, examples = [], []
    for number, one in enumerate(known):
        label = str(one["round"] + 1) if is_number(one.get("round")) else str(number + 1)
        found = one.get("sources")
        for name, source in found.items() if isinstance(found, dict) else []:
            if isinstance(source, dict):
                sources.append(_source(label, str(name), source, one))
        dropped = one.get("examples")
        examples += [
            {key: str(example.get(key) or "") for key in EXAMPLE_FIELDS} | {"round": label}
            for example in (dropped if isinstance(dropped, list) else ())
            if isinstance(example, dict)
        ]
    filters = known[-1].get("filters")
    return CuratedRun(
        run.name,
        [setting_text(each) for each in filters] if isinstance(filters, list) else [],
        sources,
        examples[:60],
    )


def _source(label: str, name: str, source: dict[str, Any], one: dict[str, Any]) -> CuratedSource:
    by = source.get("by")
    generated_by = (
        ", ".join(f"{who} {compact_number(count)}" for who, count in by.items())
        if isinstance(by, dict)
        else ""
    )
    return CuratedSource(
        round=label,
        source=name,
        generated_by=generated_by,
        prompts=compact_number(one.get("prompts")),
        kept=compact_number(one.get("kept")),
        dropped=reasons(source.get("dropped")),
        dropped_at_first=reasons(source.get("dropped_at_first")),
        resampled=compact_number(source.get("resampled")),
    )


def reasons(value: Any, before: str = "") -> list[tuple[str, str]]:
    """Reasons with their counts, from a count, a mapping of reasons, or a mapping of filters to reasons."""
    if not isinstance(value, dict):
        return [(before or "rows", compact_number(value))] if value else []
    found: list[tuple[str, str]] = []
    for name, below in value.items():
        here = f"{before}: {name}" if before else str(name)
        if isinstance(below, dict):
            found += reasons(below, here)
        elif below:
            found.append((here.replace("_", " "), compact_number(below)))
    return found


def data_tables(runs: Sequence[RunRecord]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The data sets with what was dropped and why; runs with the same data share one table."""
    grouped: dict[str, list[RunRecord]] = {}
    for run in runs:
        if sets := [*run.data, *evaluation_sets(run)]:
            grouped.setdefault(json.dumps(sets, sort_keys=True, default=str), []).append(run)
    tables = []
    for same in grouped.values():
        whole = len(same) == len(runs)
        heading = (
            ("" if len(runs) == 1 else "the same in all runs") if whole else ", ".join(r.name for r in same)
        )
        sets = [*same[0].data, *evaluation_sets(same[0])]
        tables.append((heading, [_data_row(entry) for entry in sets]))
    return tables


def evaluation_sets(run: RunRecord) -> list[dict[str, Any]]:
    """The rows that each task was measured on, as the results tell of them: entries as those of `run.data`.

    The file of the held-out prompts is that of the configuration where the result names none.
    """
    found: dict[str, dict[str, Any]] = {}
    for result in run.evaluations:
        told = result.settings
        if result.task in found or role_of(result.system) != "after" or "questions_digest" not in told:
            continue
        configured = run.config.get("evaluate.data.path") or run.config.get("data.valid.path")
        dropped, kept = told.get("dropped"), told.get("prompts")
        lost = sum(n for n in dropped.values() if is_number(n)) if isinstance(dropped, dict) else 0
        found[result.task] = {
            "name": f"evaluation: {result.task}" if result.task else "evaluation",
            "path": told.get("data") or (configured.value if configured else ""),
            "sha256": told.get("sha256") or told["questions_digest"],
            "rows": told.get("rows", kept + lost if is_number(kept) else None),
            "kept": kept,
            "dropped": dropped,
            "truncated": told.get("truncated"),
        }
    return list(found.values())


def _data_row(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": str(entry.get("name", "")),
        "path": str(entry.get("path", "")),
        "sha256": str(entry.get("sha256") or "")[:12],
        "rows": compact_number(entry.get("rows")),
        "kept": compact_number(entry.get("kept")),
        "responses": compact_number(entry.get("with_response")),
        "dropped": reasons(entry.get("dropped")),
        "truncated": reasons(entry.get("truncated")),
    }
