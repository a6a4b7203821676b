"""The page on student-written text runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.conftest import ROOT

import stillhouse


def test_the_page_on_student_text_runs_and_logs_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "student-text.md").read_text(encoding="utf-8")
    (yaml,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "distillm.yaml").write_text(yaml, encoding="utf-8")
    result = stillhouse.run("distillm.yaml", responses={"student_share": 0.8}, output={"report": False})
    assert result.state == "done"
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {name for line in lines for name in json.loads(line)}
    named = set(re.findall(r"`((?:responses|replay|seconds)/\w+)`", page))
    assert len(named) > 8
    assert named <= logged
