"""Which students are best, as far as prompts and seeds can tell, and how far the others are behind."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.console import Table, TableCell, TableColumn
from stillhouse.console.format import MISSING, is_number
from stillhouse.report.metrics import MetricInfo
from stillhouse.report.systems import System, difference, measured_differently


def ranked_students(metric: MetricInfo, systems: Sequence[System]) -> list[System]:
    """The trained students, the best first; empty where the metric ranks nothing, where there are fewer than
    two, or where they were not measured alike."""
    students = [s for s in systems if s.role == "after" and is_number(s.metrics.get(metric.name))]
    ranked = metric.kind == "quality" and metric.better is not None
    if not ranked or len(students) < 2 or measured_differently(students):
        return []
    sign = -1 if metric.better == "lower" else 1
    return sorted(students, key=lambda system: -sign * system.metrics[metric.name])


def best_students(metric: MetricInfo, systems: Sequence[System]) -> list[System]:
    """The best student and all that cannot be told apart from it; empty where nothing is ranked, or where
    nobody knows how sure any difference is.

    Each is compared with the best one; the level is shared by these comparisons (Bonferroni).
    """
    ranked = ranked_students(metric, systems)
    if not ranked:
        return []
    best, others = ranked[0], ranked[1:]
    apart = [difference(metric, best, other, len(others)) for other in others]
    if not any(apart):
        return []
    return [best, *(o for o, d in zip(others, apart, strict=True) if d is None or not d.told_apart)]


def differences_table(metric: MetricInfo, systems: Sequence[System]) -> Table | None:
    """Each student against the best one on the same prompts: the difference with its interval, and on how
    many prompts it scores higher, lower and the same; None where there is nothing to compare."""
    ranked = ranked_students(metric, systems)
    if not ranked:
        return None
    best, others = ranked[0], ranked[1:]
    rows = []
    for other in others:
        apart = difference(metric, other, best, len(others))
        if apart is None:
            continue
        ends = f"{metric.change(apart.low, 0)} to {metric.change(apart.high, 0)}"
        rows.append(
            [
                TableCell(other.label, other.label),
                TableCell(apart.value, metric.change(apart.value, 0)),
                TableCell(ends, ends),
                TableCell(apart.told_apart, "yes" if apart.told_apart else "no"),
                *_counts(metric, other, best),
            ]
        )
    if not rows:
        return None
    level = 1 - 0.05 / len(others)
    columns = [
        TableColumn("System", "system"),
        TableColumn(metric.label, "difference", numeric=True),
        TableColumn(f"{100 * level:.3g}% interval", "interval", numeric=True),
        TableColumn("told apart", "told_apart", numeric=True),
        *(TableColumn(name, name, numeric=True) for name in ("higher", "lower", "equal")),
    ]
    together = " for all comparisons together (Bonferroni)" if len(others) > 1 else ""
    note = f"Paired bootstrap over the same prompts; told apart at 95%{together}."
    return Table(
        columns, rows, f"{metric.label} against {best.label}, prompt by prompt", note, drop_columns=True
    )


def _counts(metric: MetricInfo, one: System, other: System) -> list[TableCell]:
    ours, theirs = (system.scores.by_prompt.get(metric.name, {}) for system in (one, other))
    shared = ours.keys() & theirs.keys()
    if not shared:
        return [TableCell(None, MISSING)] * 3
    higher = sum(ours[id] > theirs[id] for id in shared)
    lower = sum(ours[id] < theirs[id] for id in shared)
    return [TableCell(count, f"{count:,}") for count in (higher, lower, len(shared) - higher - lower)]
