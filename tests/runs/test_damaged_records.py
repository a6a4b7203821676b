"""What a run finds of its own records when it goes on, and cannot read, is told and left out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from stillhouse.errors import ConfigError
from stillhouse.files import read_jsonl, read_object
from stillhouse.report.chains import chain_line
from stillhouse.report.record import find_runs, load_run, read_chain
from stillhouse.rollouts.offline.curation import curation_totals
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.history import changed_values, ended
from stillhouse.runs.inputs import parent_of
from stillhouse.runs.own_settings import SETTINGS_FILE, own_settings
from stillhouse.runs.result import headline
from stillhouse.runs.sweep.folder import SweepFolder
from stillhouse.train.callbacks import MetricsLog
from stillhouse.train.checkpoints import MANIFEST, fault_of, newest_whole, remove, seal


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


NO_OBJECT = ["", "[]", "null", "3", "[" * 5000, '{"a": ' + "9" * 5000 + "}", '{"a', "\0\0\0"]
"""What a JSON file holds after a bad disk, a bad copy, or a hand."""


@pytest.mark.parametrize("text", NO_OBJECT, ids=lambda text: repr(text)[:9])
def test_a_json_file_without_an_object_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING, logger="stillhouse"):
        assert read_object(path, "nothing is lost") == {}
        assert read_object(tmp_path, "nothing is lost") == {}, "a folder in its place"
    assert f"{path}: " in caplog.text
    assert caplog.text.count("nothing is lost") == 2
    (tmp_path / "student").mkdir()
    assert parent_of(str(tmp_path / "student"), "5f0c") in (
        None,
        {"run": None, "folder": str(tmp_path), "digest": "5f0c"},
    )
    (tmp_path / "curation.json").write_text(text)
    assert curation_totals(tmp_path) == []
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "student-after.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "phase": "train"}\n[1]\n{"st\n')
    assert headline(RunFolder(tmp_path)) == {"step": 3}


@pytest.mark.parametrize("text", [*NO_OBJECT, "{}", '{"files": []}', '{"files": {}}', '{"files": null}'])
def test_a_checkpoint_whose_manifest_says_nothing_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("1")
    seal(checkpoint)
    assert fault_of(checkpoint) is None
    (checkpoint / MANIFEST).write_text(text)
    assert fault_of(checkpoint) == f"has a damaged {MANIFEST}"
    (checkpoint / MANIFEST).unlink()
    (checkpoint / MANIFEST).mkdir()
    assert fault_of(checkpoint) == f"has a damaged {MANIFEST}"
    assert newest_whole(tmp_path) is None
    assert "no checkpoint in it is whole; training begins again at its first step" in caplog.text
    remove(checkpoint)
    assert not checkpoint.exists()


SEGMENT = {"from_step": 0, "started": "2026-01-02T03:04:05+00:00", "seconds": 1.5, "changed": {}}


@pytest.mark.parametrize(
    "damaged",
    [
        None, {}, "x", {**SEGMENT, "seconds": "x"}, {**SEGMENT, "started": "x"}, {**SEGMENT, "changed": [1]},
        {**SEGMENT, "changed": {"train.lr": 1}}, {**SEGMENT, "from_step": None},
    ],
    ids=repr,
)  # fmt: skip
def test_a_damaged_part_of_the_state_costs_no_other(tmp_path: Path, damaged: Any) -> None:
    state = {"state": "done", "name": [], "parent": "x", "seconds": "x", "segments": [SEGMENT, damaged]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    folder = RunFolder(tmp_path)
    assert folder.saved_state() == {"state": "done", "segments": [SEGMENT]} == load_run(tmp_path).state
    folder.start("again", None)
    folder.end("done")
    assert len(folder.saved_state()["segments"]) == 2
    assert ended(folder.saved_state(), "done", None, 1.0)["seconds"] >= 2.5


def test_a_resumption_says_what_it_does_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("state.json", "provenance.json", "inputs.json"):
        (tmp_path / name).write_text("{")
    with caplog.at_level(logging.WARNING, logger="stillhouse"):
        RunFolder(tmp_path).check(resume=True)
    for words in ("when the run was started", "its values have changed", "its data and models are those"):
        assert words in caplog.text
    (tmp_path / "state.json").unlink()
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"state\.json is gone, but there are checkpoints: put it back"):
        RunFolder(tmp_path).check(resume=True)


@pytest.mark.parametrize(
    "text",
    [
        *NO_OBJECT, "{}", '{"stages": 3, "known": [1], "seconds": "x", "state": [], "runs": "x"}',
        '{"stages": [3, {"name": "a"}], "known": {"a": "x"}, "started": 3, "runs": {"a": [1]}}',
    ],
    ids=lambda text: repr(text)[:60],
)  # fmt: skip
def test_chains_and_sweeps_are_read_as_far_as_they_are_sound(tmp_path: Path, text: str) -> None:
    for name in ("chain.json", "sweep.json"):
        (tmp_path / name).write_text(text)
    chain = read_chain(tmp_path)
    assert chain["stages"] in ([], [{"name": "a"}])
    assert chain["known"] == {}
    assert "seconds" not in chain
    assert f"{tmp_path}: the chain" in chain_line(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "state.json").write_text("{}")
    assert find_runs([tmp_path]) == [tmp_path / "a"]
    folder = SweepFolder(tmp_path)
    folder.start("", {})
    assert folder.lines == {}


@pytest.mark.parametrize("text", [*NO_OBJECT, '{"data": 3}', '{"evaluate": ["x"]}'])
def test_settings_of_a_student_that_cannot_be_read_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(ConfigError, match=f"{SETTINGS_FILE}: cannot be read .*give --template"):
        own_settings(str(tmp_path))


@pytest.mark.parametrize("text", ["data: 3", "evaluate: [x]"])
def test_a_resolved_file_that_no_run_wrote_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "resolved.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"resolved\.yaml: cannot be read .*put back"):
        own_settings(str(tmp_path))
