"""Stages that write, filter and rank responses: checked before anything is written, killed and resumed to the
same bytes, and told in words."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stillhouse
from stillhouse.errors import ConfigError, StillhouseError
from stillhouse.files import read_jsonl
from stillhouse.report.chains import rows_text
from stillhouse.runs.chains.check import check_chain
from stillhouse.runs.chains.record import output_digest
from stillhouse.runs.chains.resolve import resolve_chain
from tests.devices import WITHOUT_GPU
from tests.small_runs import TEACHER, in_child, in_two, write_data

STAGES = ("texts", "kept", "ranked", "distil")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data-stages")
    write_data(folder, rows=8)
    return folder


def chain(data: Path, name: str) -> dict[str, Any]:
    """The teacher writes twice for each prompt; filtered for one training, ranked for another."""
    least_likely = {"kind": "logprob_floor", "drop_share": 0.25}
    return {
        "name": name,
        "teacher": {"kind": "live", "path": TEACHER},
        "data": {"train": str(data / "train.jsonl"), "template": "plain", "max_response": 16},
        "engine": {"sampling": {"temperature": 1.0}},
        "train": {"max_steps": 1, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-3},
        "output": {"folder": str(data / name), "report": False},
        "stages": {
            "texts": {"generate": {"samples": 2, "chunk": 4, "score": True}},
            "kept": {"curate": {"of": "stage:texts", "filters": [least_likely]}},
            "ranked": {"pairs": {"of": ["stage:texts"], "rank": "rouge_l"}},
            "distil": {
                "recipe": "kd",
                "student": {"from_teacher": {"layers": [0]}},
                "data": {"train": "stage:kept", "valid": None},
            },
        },
    }  # fmt: skip


def _goes_on_writing(event: str, file: str) -> bool:
    """Whether a shard is opened that has rows already."""
    return "texts/rows.shard" in file and os.path.exists(file) and os.path.getsize(file) > 0


def _opens(text: str, event: str, file: str) -> bool:
    return text in file


@pytest.fixture(scope="module")
def straight(data: Path) -> Path:
    """A chain that was never stopped."""
    stillhouse.run(chain(data, "straight"))
    return data / "straight"


def test_stages_of_data_killed_while_they_write_end_as_the_straight_ones(data: Path, straight: Path) -> None:
    made, folder = chain(data, "killed"), data / "killed"
    for number, die in enumerate((_goes_on_writing, partial(_opens, "kept/.rows.dropped"))):
        assert in_child(made, resume=number > 0, die=die, env=WITHOUT_GPU) < 0
        assert not (folder / STAGES[number] / "rows.jsonl").exists()
        if number == 0:
            [shard] = (folder / "texts").glob("rows.shard*")
            assert 0 < len(read_jsonl(shard)) - 1 < 16  # some are there, and stay
    stillhouse.run(made, resume=True)
    for name in STAGES:
        assert output_digest(folder / name) == output_digest(straight / name), name


def test_two_processes_write_and_train_together_and_one_does_the_rest(data: Path, straight: Path) -> None:
    made = chain(data, "two")
    made["stages"]["int8"] = {"quantise": {"weights": "int8"}, "student": {"path": "stage:distil"}}
    made["stages"]["again"] = {**made["stages"]["distil"], "student": {"path": "stage:distil"}}
    assert in_two(made) == [0, 0]
    for name in ("texts", "kept", "ranked"):
        assert output_digest(data / "two" / name) == output_digest(straight / name), name
    for name in ("int8", "again"):
        state = json.loads((data / "two" / name / "state.json").read_text(encoding="utf-8"))
        assert (state["state"], state["segments"][0]["processes"]) == ("done", 1 if name == "int8" else 2)
    one, two = (load_file(place / "distil/student/model.safetensors") for place in (straight, data / "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_what_stages_of_data_leave_is_data_for_others(straight: Path) -> None:
    texts, kept, ranked = (read_jsonl(straight / name / "rows.jsonl")[1:] for name in STAGES[:3])
    assert len(texts) == 16
    assert [row["response"] for row in kept] == [row["response"] for row in texts if row in kept]
    assert len(kept) == 12
    assert all({"chosen", "rejected"} <= row.keys() for row in ranked)
    state = json.loads((straight / "kept" / "state.json").read_text(encoding="utf-8"))
    assert (state["state"], state["stage"], state["rows"]["rows"]) == ("done", "curate", 12)
    assert rows_text(state["rows"]).startswith("12 rows of 16; dropped: 4 x teacher, logprob_floor: ")
    config = json.loads((straight / "distil" / "provenance.json").read_text(encoding="utf-8"))
    assert config["data.train.path"]["value"] == str(straight / "kept" / "rows.jsonl")


def test_a_changed_stage_of_data_is_told(data: Path, straight: Path) -> None:
    with pytest.raises(ConfigError) as told:
        stillhouse.run(chain(data, "straight"), resume=True, **{"stages.texts.generate.samples": 3})
    assert "stages.texts: " in str(told.value)
    assert "generate.samples (2 -> 3)" in str(told.value)
    assert "--redo texts" in str(told.value)
    rows = straight / "kept" / "rows.jsonl"
    before = rows.read_text(encoding="utf-8")
    rows.write_text("\n".join(before.splitlines()[:-1]) + "\n", encoding="utf-8")
    try:
        with pytest.raises(ConfigError, match=r"stages\.kept: its rows .*rows.jsonl\) have been changed"):
            stillhouse.run(chain(data, "straight"), resume=True)
    finally:
        rows.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("texts.generate", {"by": "nobody"}, "stages.texts.generate.by (dictionary): "),
        ("texts.train", {"lr": 1.0}, "stages.texts.train (dictionary): has no effect in a"),
        ("texts.teacher", None, "stages.texts."),
        ("kept.curate.of", "stage:text", "called 'text' (did you mean 'texts'?)"),
        ("kept.curate.of", "stage:ranked", "the stage ranked comes later"),
        ("kept.curate.filters", [{"kind": "overlap"}], "stages.kept.curate.held_out: has nothing to compare"),
        ("kept.curate.filters", [], "needs exactly one of filters, best and drafts, got none"),
        ("kept.curate.best", "rouge_l", "needs exactly one of filters, best and drafts, got filters, best"),
        ("texts.generate.score", False, "stages.kept.curate.teacher: 16 responses have no likelihood"),
        ("ranked.pairs.rank", "rouge", "stages.ranked.pairs.rank (dictionary): "),
        ("distil.data.train", "stage:kept/none.jsonl", "stages.distil.data.train: stage:kept/none.jsonl"),
        ("distil.student", {"path": "stage:kept"}, "stages.distil.student.path: stage:kept"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_written(
    data: Path, path: str, value: Any, words: str
) -> None:
    made = chain(data, "refused")
    *above, last = path.split(".")
    place = made["stages"]
    for key in above:
        place = place[key]
    place[last] = value
    with pytest.raises(StillhouseError) as told:
        check_chain(resolve_chain(made))
    assert words in str(told.value)
    assert not (data / "refused").exists()
