"""Run folders are read as they are: whole, partial, damaged, nested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.errors import DataError
from stillhouse.report import find_runs, load_run


def test_a_whole_run(three_runs):
    run = load_run(three_runs / "kd")
    assert (run.name, run.recipe, run.status) == ("kd", "kd", "done")
    assert run.config["train.seed"].origin == "command line"
    assert len(run.metrics("train")) == 120
    assert {result.system for result in run.evaluations} == {"teacher", "student before", "student after"}
    assert len(run.evaluations[0].rows) == 12
    assert run.problems == []


def test_an_empty_folder_is_an_empty_record(tmp_path):
    run = load_run(tmp_path)
    assert (run.name, run.recipe, run.status) == (tmp_path.name, "", "unknown")
    assert (run.config, run.log, run.evaluations, run.problems) == ({}, [], [], [])


def test_what_cannot_be_read_is_named(three_runs):
    folder = three_runs / "kd"
    (folder / "state.json").write_text('{"state": "do', encoding="utf-8")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as handle:
        handle.write('{"phase": "train", "ste')
    run = load_run(folder)
    assert run.name == "kd"
    assert len(run.metrics("train")) == 120
    assert any("state.json" in problem for problem in run.problems)
    assert any("metrics.jsonl: 1 line " in problem for problem in run.problems)


def test_steps_logged_again_after_a_resume_count_once(tmp_path):
    steps = [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5), (3, 1.5), (4, 1.2)]
    lines = [json.dumps({"phase": "train", "step": step, "loss": loss}) for step, loss in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [row["loss"] for row in load_run(tmp_path).log] == [3.0, 2.5, 1.5, 1.2]


def test_without_provenance_the_resolved_file_is_shown(tmp_path):
    (tmp_path / "resolved.yaml").write_text(
        "train: {lr: 0.1, betas: [0.9, 0.99]}\nrecipe: kd\n", encoding="utf-8"
    )
    run = load_run(tmp_path)
    assert {path: setting.value for path, setting in run.config.items()} == {
        "train.lr": 0.1, "train.betas": [0.9, 0.99], "recipe": "kd",
    }  # fmt: skip
    assert run.recipe == "kd"


def test_nested_runs_are_found_oldest_first(three_runs):
    names = [path.name for path in find_runs([three_runs])]
    assert names == ["kd", "gkd", "distillm2"]
    assert find_runs([three_runs / "gkd", three_runs])[0].name == "gkd"
    assert len(find_runs([three_runs / "gkd", three_runs])) == 3


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        find_runs([tmp_path])
    with pytest.raises(DataError, match="is not a folder"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(DataError, match="is not a folder"):
        load_run(Path("no/such/run"))
