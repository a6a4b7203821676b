"""docs/performance.md shows the committed measurements, and they are what the page says."""

from __future__ import annotations

import json

from tests.conftest import ROOT, script


def test_the_tables_are_those_of_the_results() -> None:
    (page,) = script(ROOT / "docs" / "build_performance.py").pages().values()
    assert page == (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), "run: make docs"


def test_fp32_logits_keep_the_gradient_within_three_thousandths() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "logit_precision.json").read_text())["rows"]
    assert max(row[f"fp32_{part}"] for row in rows for part in ("hidden", "head")) < 3e-3
