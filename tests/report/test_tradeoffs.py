"""Quality against size, speed and cost: which points the Pareto line joins, and when there is a plot."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.report.record import RunRecord
from stillhouse.report.systems import System
from stillhouse.report.tradeoffs import pareto, tradeoff_plots

POINT = st.tuples(st.integers(0, 6), st.integers(0, 6))


@given(st.lists(POINT, min_size=1, max_size=12), st.booleans(), st.booleans())
def test_every_point_is_on_the_line_or_beaten_by_one_that_is(
    points: list[tuple[float, float]], lower_x: bool, lower_y: bool
) -> None:
    line = pareto(points, lower_x=lower_x, lower_y=lower_y)

    def at_least(one: tuple[float, float], other: tuple[float, float]) -> bool:
        x = one[0] <= other[0] if lower_x else one[0] >= other[0]
        return x and (one[1] <= other[1] if lower_y else one[1] >= other[1])

    assert all(any(at_least(best, point) for best in line) for point in points)
    assert not [(one, other) for one in line for other in line if one != other and at_least(one, other)]


def students(**more: list[float]) -> list[System]:
    names = ("a", "b", "c", "d")
    return [
        System(
            f"student {name}",
            "after",
            "e2e",
            run=number,
            metrics={"rouge_l": 30.0 + number, **{key: values[number] for key, values in more.items()}},
            settings={},
            rows=[],
            colour=f"--run-{number}",
        )
        for number, name in enumerate(names[: len(next(iter(more.values())))])
    ]


@pytest.mark.parametrize(
    ("parameters", "plots"), [([1e6, 2e6, 3e6], 1), ([1e6, 1e6, 1e6], 0), ([1e6, 2e6], 0)]
)
def test_there_is_a_plot_where_three_students_differ(parameters: list[float], plots: int) -> None:
    found = tradeoff_plots(students(parameters=parameters), [RunRecord(Path("x"))] * 3)
    assert [one.key for one in found] == ["tradeoff-size"] * plots


def test_the_line_and_the_students_are_drawn_and_explained() -> None:
    (plot,) = tradeoff_plots(students(parameters=[1e6, 3e6, 2e6]), [RunRecord(Path("x"))] * 3)
    assert [label for label, _ in plot.legend] == ["not beaten in both", *[f"student {n}" for n in "abc"]]
    assert "ROUGE-L" in plot.svg
    assert "within chance" in plot.caption


def test_cost_is_the_mean_over_the_runs_of_all_seeds() -> None:
    runs = [RunRecord(Path("x"), state={"seconds": seconds}) for seconds in (10.0, 30.0, 5.0, 7.0)]
    first, second, *others = students(parameters=[1e6, 1e6, 1e6, 1e6])
    both = System("a", "after", "e2e", 0, first.metrics, {}, [], members=(first, second), colour="--run-0")
    plots = {plot.key: plot for plot in tradeoff_plots([both, *others], runs)}
    assert "tradeoff-cost" in plots
    assert "tradeoff-size" not in plots, "all have the same size"
