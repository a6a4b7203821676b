"""docs/estimates.md shows the committed measurements, and they are as near as the page says."""

from __future__ import annotations

import json

from tests.conftest import ROOT, script


def test_the_table_is_that_of_the_result() -> None:
    (page,) = script(ROOT / "docs" / "build_estimates.py").pages().values()
    assert page == (ROOT / "docs" / "estimates.md").read_text(encoding="utf-8"), "run: make docs"


def test_the_estimates_are_as_near_as_the_page_says() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "estimates.json").read_text())["rows"]
    assert len({row["student parameters"] for row in rows}) >= 3
    assert all(0.85 <= row["ratio"] <= 1.15 for row in rows), rows
    timed = [row["ratio of seconds"] for row in rows if "ratio of seconds" in row]
    assert timed
    assert all(0.75 <= ratio <= 1.25 for ratio in timed), rows
    runs = json.loads((ROOT / "benchmarks" / "results" / "wall_time.json").read_text())["rows"]
    assert len(runs) == 4
    ends = [run["processor"]["ratio"] for run in runs]
    assert all(low <= 1.1 and 0.9 <= high <= 1.2 for low, high in ends), "the range of a whole run, processor"
