"""Quality against size, speed and cost, with the line of students that no other one beats in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stillhouse.console.format import is_number
from stillhouse.report.metrics import MetricInfo, main_metric
from stillhouse.report.plots import Curve, Plot, line_plot
from stillhouse.report.record import RunRecord
from stillhouse.report.systems import System

FEWEST = 3
"""Students from which on there is something to choose between."""
LINE = "--soft"
CAPTION = (
    "The line joins the students that no other one beats in both; which lie within chance it does not say."
)


class Price(NamedTuple):
    """What quality is paid with. Example: `Price("size", "parameters", "lower", of=parameters)`"""

    name: str
    unit: str
    better: str
    of: Callable[[System, Sequence[System], Sequence[RunRecord]], float | None]
    """(student, all systems, runs) -> what it pays; None where nobody knows."""
    log: bool = False


def tradeoff_plots(systems: Sequence[System], runs: Sequence[RunRecord]) -> list[Plot]:
    """A plot for each price that differs between at least three students of the first task."""
    if not systems:
        return []
    here = [one for one in systems if one.task == systems[0].task]
    main = main_metric(one.metrics for one in here)
    if main is None:
        return []
    students = [
        one for one in here if one.role == "after" and _number(one.metrics.get(main.name)) is not None
    ]
    plots = []
    for price in PRICES:
        found = [(one, price.of(one, systems, runs)) for one in students]
        known = [(one, paid) for one, paid in found if paid is not None]
        if len(known) >= FEWEST and len({paid for _, paid in known}) > 1:
            plots.append(_plot(price, main, known))
    return plots


def _plot(price: Price, main: MetricInfo, students: Sequence[tuple[System, float]]) -> Plot:
    scale = 100 if main.style == "share" else 1
    points = [(paid, scale * float(one.metrics[main.name])) for one, paid in students]
    best = pareto(points, lower_x=price.better == "lower", lower_y=main.better == "lower")
    curves = [Curve("not beaten in both", LINE, best)] if len(best) > 1 else []
    for (one, _), point in zip(students, points, strict=True):
        half = _half_interval(one, main)
        spread = () if half is None else (scale * half,)
        curves.append(Curve(one.label, one.colour, [point], marked=True, spread=spread))
    unit = f"{main.label} (%)" if scale == 100 else main.label
    title = f"{main.label} against {price.name}"
    return line_plot(f"tradeoff-{price.name}", title, curves, price.unit, unit, CAPTION, log_x=price.log)


def pareto(
    points: Sequence[tuple[float, float]], *, lower_x: bool, lower_y: bool
) -> list[tuple[float, float]]:
    """The points that no other one is better than in one coordinate and as good as in the other, by x.

    Args:
        points: (x, y).
        lower_x: whether less is better in x.
        lower_y: whether less is better in y.
    """

    def worth(point: tuple[float, float]) -> tuple[float, float]:
        return (-point[0] if lower_x else point[0]), (-point[1] if lower_y else point[1])

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        (x, y), (other_x, other_y) = worth(one), worth(other)
        return x >= other_x and y >= other_y and (x, y) != (other_x, other_y)

    return sorted({point for point in points if not any(beats(other, point) for other in points)})


def _half_interval(system: System, main: MetricInfo) -> float | None:
    low, high = (_number(system.metrics.get(f"{main.name}_{end}")) for end in ("low", "high"))
    return None if low is None or high is None else (high - low) / 2


def _measured(name: str) -> Callable[[System, Sequence[System], Sequence[RunRecord]], float | None]:
    """What a student was measured to have, on whichever task."""

    def of(system: System, systems: Sequence[System], runs: Sequence[RunRecord]) -> float | None:
        values = (_number(one.metrics.get(name)) for one in systems if one.who == system.who)
        return next((value for value in values if value is not None and value > 0), None)

    return of


def _seconds(system: System, systems: Sequence[System], runs: Sequence[RunRecord]) -> float | None:
    """How long its run took, from start to end; of several seeds the mean."""
    own = [runs[one.run] for one in (system.members or (system,)) if one.run is not None]
    known = [seconds for run in own if (seconds := _number(run.state.get("seconds"))) is not None]
    return sum(known) / len(known) if known and len(known) == len(own) else None


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) and math.isfinite(value) else None


PRICES = (
    Price("size", "parameters", "lower", _measured("parameters"), log=True),
    Price("speed", "tokens/s", "higher", _measured("tokens_per_second"), log=True),
    Price("cost", "seconds of the run", "lower", _seconds),
)
