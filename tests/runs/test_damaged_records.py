"""What a run finds of its own records when it goes on, and cannot read, is told and left out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from stillhouse.files import read_jsonl
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.history import changed_values
from stillhouse.train.callbacks import MetricsLog


def test_damaged_lines_of_the_metrics_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n[3]\n{"a": 1}\n{"step": 4, "loss": 1.0}\n')
    with caplog.at_level(logging.WARNING, logger="stillhouse"):
        MetricsLog(path, cast(Any, None)).cut(after=3)
    assert read_jsonl(path) == [{"step": 1, "loss": 2.0}]
    assert "metrics.jsonl: 3 damaged lines are left out" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"train.lr": null}'])
def test_records_of_another_shape_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "provenance.json").write_text(text)
    assert RunFolder(tmp_path).facts("provenance.json") == {}


def test_an_entry_without_its_value_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({"train.lr": {"a": 1}}))
    before = RunFolder(tmp_path).facts("provenance.json")
    assert changed_values(before, {"train.lr": {"value": 0.1, "origin": "run.yaml:3"}}) == {
        "train.lr": [None, 0.1]
    }
