from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.made_runs import make_run


@pytest.fixture
def three_runs(tmp_path: Path) -> Path:
    """A folder with three runs in it."""
    parent = tmp_path / "runs"
    for recipe, score in (("kd", 55.2), ("distillm2", 58.3), ("gkd", 56.9)):
        make_run(parent / recipe, recipe, score=score)
    return parent
