"""Plots of evaluation results that are curves themselves: quality against diversity, drafts against gamma."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from stillhouse.report.measures import is_number
from stillhouse.report.plots import Curve, Plot, line_plot
from stillhouse.report.systems import System

AGAINST = {
    "self_bleu": ("Quality and diversity: Self-BLEU", "Self-BLEU (left is more varied)"),
    "distinct_2": ("Quality and diversity: distinct-2", "distinct-2 (right is more varied)"),
}
GAMMA = {
    "block_efficiency": ("Speculative decoding: block efficiency", "tokens a teacher pass"),
    "acceptance": ("Speculative decoding: acceptance", "share of the student's tokens"),
}


def diversity_plots(systems: Sequence[System]) -> list[Plot]:
    """ROUGE-L against the diversity of the answers over temperatures, for every task `curve`: a system is
    better where its line lies higher at the same diversity. Error bars are standard deviations over seeds."""
    caption = "A point for each sampling temperature T. Higher at the same diversity is better."
    plots: list[Plot] = []
    for task, here in _with_list(systems, "curve"):
        for name, (title, unit) in AGAINST.items():
            curves = [curve for system in here if (curve := _curve(system, name)) is not None]
            if curves:
                curves[1:] = [
                    replace(curve, notes=()) for curve in curves[1:]
                ]  # they would lie on each other
                key = f"diversity-{name}-{len(plots)}"
                plots.append(line_plot(key, f"{title}{task}", curves, unit, "ROUGE-L", caption))
    return plots


def draft_plots(systems: Sequence[System]) -> list[Plot]:
    """What the student saves as the teacher's draft model, over how many tokens it proposes at a time."""
    plots: list[Plot] = []
    for task, here in _with_list(systems, "by_gamma"):
        for name, (title, unit) in GAMMA.items():
            curves = []
            for system in here:
                points = [
                    (point["gamma"], point[name])
                    for point in _points(system.metrics["by_gamma"], "gamma", name)
                ]
                if points:
                    curves.append(Curve(system.label, system.colour, points, marked=True))
            if curves:
                plots.append(line_plot(f"draft-{name}-{len(plots)}", f"{title}{task}", curves, "gamma", unit))
    return plots


def _with_list(systems: Sequence[System], name: str) -> Iterator[tuple[str, list[System]]]:
    """The systems of each task that have such a list; the task is a suffix for titles, where needed."""
    having = [system for system in systems if isinstance(system.metrics.get(name), list)]
    tasks = list(dict.fromkeys(system.task for system in having))
    for task in tasks:
        yield (f" · {task}" if len(tasks) > 1 else ""), [system for system in having if system.task == task]


def _curve(system: System, against: str) -> Curve | None:
    known = _points(system.metrics["curve"], against, "rouge_l", "temperature")
    points = sorted(known, key=lambda point: float(point["temperature"]))
    if not points:
        return None
    ends = (points[0], points[-1])
    spreads = [point.get("rouge_l_std") for point in points]
    return Curve(
        system.label,
        system.colour,
        [(point[against], point["rouge_l"]) for point in points],
        marked=True,
        notes=[f"T={point['temperature']:g}" if point in ends else "" for point in points],
        spread=[spread if is_number(spread) and math.isfinite(spread) else 0.0 for spread in spreads],
    )


def _points(found: list[Any], *names: str) -> list[dict[str, Any]]:
    """The points in which all these names are finite numbers."""
    return [
        point
        for point in found
        if isinstance(point, dict)
        and all(is_number(point.get(name)) and math.isfinite(point[name]) for name in names)
    ]
