"""A list of runs tells how they stand, whatever their folders say."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.errors import DataError
from stillhouse.report.listing import RunSummary, best_score, list_runs, runs_table
from stillhouse.report.record import load_run
from tests.report.made_runs import make_run

NOW = datetime.datetime(2030, 1, 2, 13, 30, tzinfo=datetime.UTC)


def cells(line: RunSummary) -> list[str]:
    (row,) = runs_table([line]).rows
    return [cell.text for cell in row]


def set_state(folder: Path, **facts: object) -> None:
    path = folder / "state.json"
    state = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**state, **facts}), encoding="utf-8")


def test_a_finished_run(three_runs):
    line = list_runs([three_runs], NOW)[0]
    assert (line.name, line.state, line.method, line.step) == ("kd", "done", "kd", 120)
    assert line.score is not None
    assert (line.score.metric, line.score.value, line.score.on, line.score.step) == (
        "rouge_l",
        55.2,
        "e2e",
        None,
    )
    assert cells(line)[1:] == ["done", "kd", "120", "ROUGE-L 55.2 (e2e, 12 prompts)", "3 h ago", "1 min 01 s"]


def test_before_the_end_the_best_validation_counts(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "evaluation/student_after.json").unlink()
    run = load_run(folder)
    best = max(run.metrics("valid"), key=lambda row: row["rouge_l"])
    score = best_score(run)
    assert score is not None
    assert (score.value, score.on, score.step) == (best["rouge_l"], "validation", best["step"])
    without = [
        {"phase": "valid", "step": step, "loss": loss} for step, loss in ((1, 2.0), (2, 1.5), (3, 1.7))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    score = best_score(load_run(folder))
    assert score is not None
    assert (score.metric, score.value, score.step) == ("loss", 1.5, 2)


def test_a_run_is_running_only_while_its_process_lives(tmp_path):
    folder = make_run(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    started = datetime.datetime.now(datetime.UTC).isoformat()
    set_state(folder, state="running", process=process.pid, started=started, max_steps=400)
    line = list_runs([folder])[0]
    assert (line.state, cells(line)[3]) == ("running", "120/400")
    process.communicate()
    line = list_runs([folder])[0]
    assert line.state == "interrupted"
    assert "--resume" in line.message
    assert load_run(folder).status == "interrupted"


def test_another_process_with_the_number_is_not_the_run(tmp_path):
    folder = make_run(tmp_path / "run")
    set_state(folder, state="running", process=os.getppid(), started="2001-01-01T00:00:00+00:00")
    assert list_runs([folder])[0].state == "interrupted"


def test_a_run_of_another_machine_is_taken_at_its_word(tmp_path):
    folder = make_run(tmp_path / "run")
    set_state(folder, state="running", process=999_999_999, host="elsewhere")
    line = list_runs([folder])[0]
    assert line.state == "running"
    assert "another machine" in line.message


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"state": 3, "started": "soon", "seconds": "x", "max_steps": "y"}', "{}"]
)
def test_a_broken_state_is_unknown_and_no_error(tmp_path, text):
    folder = make_run(tmp_path / "run")
    (folder / "state.json").write_text(text)
    line = list_runs([folder])[0]
    assert line.state in ("unknown", "3")
    assert (line.age_seconds, line.seconds, line.max_steps) == (None, None, None)
    assert cells(line)[5] == "–"


def test_no_runs_is_said(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        list_runs([tmp_path / "runs"])
