"""Chains: stages in one file, checked before anything runs, killed anywhere and resumed to the same bits."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stillhouse
from stillhouse.errors import ConfigError, DataError, ModelError
from stillhouse.files import write_jsonl
from stillhouse.models.paths import resolve_path
from stillhouse.report import load_runs
from stillhouse.report.chains import stage_tables
from stillhouse.runs.chains.check import check_chain
from stillhouse.runs.chains.record import output_digest
from stillhouse.runs.chains.resolve import resolve_chain
from tests.devices import WITHOUT_GPU
from tests.small_runs import TEACHER, in_child, write_data

STAGES = ("warm", "distil", "prefer", "int4", "ship")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chains")
    write_data(folder, rows=16)
    return folder


def chain(data: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Warm start, distillation, preference, quantisation, export."""
    valid = str(data / "valid.jsonl")
    preference = {"kind": "preference", "data": str(data / "pairs.jsonl"), "reference": "stage:distil"}
    return {
        "name": name,
        "teacher": {"kind": "live", "path": TEACHER},
        "data": {
            "train": str(data / "train.jsonl"),
            "template": {"kind": "plain"},
            "max_prompt": 96,
            "max_response": 10,
        },
        "train": {
            "max_steps": 3, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "save_every": 1,
        },
        "evaluate": {"data": valid, "before": False, "teacher": False, "sampling": {"max_tokens": 6}},
        "output": {"folder": str(data / name)},
        "stages": {
            "warm": {"recipe": "sft", "student": {"from_teacher": {"layers": [0, 3]}}},
            "distil": {"recipe": "kd", "student": {"path": "stage:warm"}, "train": {"lr": 2e-3}},
            "prefer": {
                "recipe": "dpo",
                "student": {"path": "stage:distil"},
                "teachers": {"reference": {"kind": "live", "path": "stage:distil"}},
                "data": {"train": str(data / "pairs.jsonl")},
                "evaluate": {"tasks": [preference]},
            },
            "int4": {"quantise": {"weights": "int4"}, "student": {"path": "stage:prefer"}},
            "ship": {"export": {"smoke_test": False}, "student": {"path": "stage:prefer"}},
        },
        **changes,
    }  # fmt: skip


def outputs(folder: Path) -> dict[str, str]:
    """What each stage has left; of int4 the tensors, because safetensors writes its metadata in any order."""
    found = {name: output_digest(folder / name) for name in STAGES}
    tensors = load_file(folder / "int4" / "student" / "model.safetensors")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return {**found, "int4": digest.hexdigest()}


@pytest.fixture(scope="module")
def straight(data: Path) -> Path:
    """A chain that was never stopped."""
    assert in_child(chain(data, "straight"), env=WITHOUT_GPU) == 0
    return data / "straight"


def _opens(text: str, event: str, file: str) -> bool:
    return text in file


MOMENTS = (
    "warm/checkpoints/checkpoint-2/complete.json",
    "distil/checkpoints/checkpoint-1/complete.json",
    "prefer/evaluation/.student-after.json",
    "int4/.student.new",
    "ship/.student.new",
)


def test_a_chain_killed_in_every_stage_ends_as_the_straight_one(data: Path, straight: Path) -> None:
    folder = data / "killed"
    made = chain(data, "killed")
    for number, moment in enumerate(MOMENTS):
        before = {name: (folder / name / "state.json").read_bytes() for name in STAGES[: max(0, number - 1)]}
        die = partial(_opens, f"killed/{moment}")
        assert in_child(made, resume=number > 0, die=die, env=WITHOUT_GPU) < 0, moment
        found = json.loads((folder / "chain.json").read_text(encoding="utf-8"))
        assert found["state"] == "running"
        assert [name for name in STAGES if "output" in found["known"].get(name, {})] == [*STAGES[:number]]
        assert before == {name: (folder / name / "state.json").read_bytes() for name in before}
    assert in_child(made, resume=True, env=WITHOUT_GPU) == 0
    assert outputs(folder) == outputs(straight)
    assert json.loads((folder / "chain.json").read_text(encoding="utf-8"))["state"] == "done"


def test_each_stage_is_a_run_folder(straight: Path) -> None:
    for name in STAGES:
        state = json.loads((straight / name / "state.json").read_text(encoding="utf-8"))
        assert state["state"] == "done"
        assert (straight / name / "resolved.yaml").is_file()
    assert (straight / "report.html").is_file()
    parent = json.loads((straight / "prefer" / "state.json").read_text(encoding="utf-8"))["parent"]
    assert parent["run"] == "distil"
    int4 = json.loads((straight / "int4" / "evaluation" / "student-after.json").read_text(encoding="utf-8"))
    whole = json.loads(
        (straight / "prefer" / "evaluation" / "student-after.json").read_text(encoding="utf-8")
    )
    assert int4["label"] == "int4"
    assert int4["settings"]["questions_digest"] == whole["settings"]["questions_digest"]
    assert int4["metrics"]["loss"] != whole["metrics"]["loss"]


def test_a_finished_chain_is_recognised_and_a_changed_one_is_told(data: Path, straight: Path) -> None:
    folder = data / "again"
    shutil.copytree(straight, folder)
    made = chain(data, "again")
    with pytest.raises(ConfigError, match="already contains a chain"):
        stillhouse.run(made)
    result = stillhouse.run(made, resume=True)
    assert result.state == "done"
    assert list(result.stages) == list(STAGES)
    assert outputs(folder) == outputs(straight)
    with pytest.raises(ConfigError) as told:
        stillhouse.run(made, resume=True, **{"stages.distil.train.lr": 3e-3})
    assert "stages.distil: " in str(told.value)
    assert "train.lr (0.002 -> 0.003)" in str(told.value)
    assert "--redo distil" in str(told.value)
    with pytest.raises(
        ConfigError
    ) as told:  # a finished run may be made longer, and then what follows is stale
        stillhouse.run(made, resume=True, **{"stages.distil.train.max_steps": 4})
    assert "stages.prefer: was made from what distil left, which is now to be made otherwise" in str(
        told.value
    )
    (folder / "distil" / "student" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"stages\.distil: its student .* has been changed"):
        stillhouse.run(made, resume=True)
    result = stillhouse.run(made, redo="distil", until="prefer", **{"stages.distil.train.lr": 3e-3})
    assert result.state == "interrupted"
    assert output_digest(folder / "warm") == output_digest(straight / "warm")
    assert output_digest(folder / "prefer") != output_digest(straight / "prefer")
    assert not (folder / "int4").exists()


def test_data_that_changed_invalidate_a_stage(data: Path, straight: Path) -> None:
    pairs = data / "pairs.jsonl"
    before = pairs.read_text(encoding="utf-8")
    pairs.write_text("\n".join(before.splitlines()[:-1]) + "\n", encoding="utf-8")
    try:
        with pytest.raises(ConfigError, match=r"stages\.prefer: was made from another data\.train"):
            stillhouse.run(chain(data, "straight"), resume=True)
    finally:
        pairs.write_text(before, encoding="utf-8")


def refused(data: Path, changes: dict[str, Any]) -> str:
    made = chain(data, "refused")
    for path, value in changes.items():
        *above, last = path.split(".")
        place = made
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    with pytest.raises((ConfigError, DataError, ModelError)) as told:
        check_chain(resolve_chain(made))
    assert not (data / "refused").exists()
    return str(told.value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("stages.prefer.student.path", "stage:distill", "called 'distill' (did you mean 'distil'?)"),
        ("stages.distil.student.path", "stage:prefer", "the stage prefer comes later"),
        ("stages.distil.student.path", "stage:distil", "a stage cannot start from itself"),
        ("stages.distil.student", {}, "stages.distil.student (dictionary): needs exactly"),
        ("stages.int4.quantise", {"weights": "int3"}, "stages.int4.quantise.weights (dictionary): is none"),
        ("stages.int4.student", {}, "stages.int4.student.path (dictionary): is missing"),
        ("stages.int4.train", {"lr": 1.0}, "stages.int4.train (dictionary): has no effect in a"),
        ("stages.int4.export", {}, "has no effect in a stage with quantise"),
        ("stages.distil.recipe", "kdd", "did you mean"),
        ("stages.distil.traim", {}, "stages.distil.traim (dictionary): unknown key (did you mean 'train'?)"),
        ("traim", {}, "traim (dictionary): unknown key (did you mean 'train'?)"),
        ("stages.distil.output", {"folder": "x"}, "a stage has its folder in the chain's"),
        ("stages.a b", {}, "the name of a stage is that of its folder"),
        ("stages", [], "needs the stages by name, in order"),
        ("train.lr", "x", "\n- train.lr (dictionary): has the wrong type"),
        ("stages.prefer.data.train", "none.jsonl", "stages.prefer.data.train: "),
        ("stages.warm.student", {"from_teacher": {"layers": [0, 9]}}, "stages.warm: "),
        ("stages.prefer.evaluate.sampling", {"max_tokens": 999}, "stages.prefer.data.max_response: the"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(data: Path, path: str, value: Any, words: str) -> None:
    assert words in f"\n- {refused(data, {path: value})}"


def test_a_student_that_will_not_fit_its_teacher_is_refused_before_it_is_made(data: Path) -> None:
    other = {
        "from_config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    }
    told = refused(data, {"stages.warm.student": {"tokenizer": TEACHER, **other}})
    assert "stages.warm.data.max_response" in told  # its own context
    other["from_config"]["n_positions"] = 110
    told = refused(
        data,
        {
            "stages.warm.student": {"tokenizer": TEACHER, **other},
            "stages.distil.evaluate.sampling": {"max_tokens": 100},
        },
    )
    assert "stages.distil.data.max_response: the longest prompt" in told
    assert "the context of the student" in told


def test_a_shared_value_is_told_once_and_one_of_a_stage_with_its_name(data: Path) -> None:
    made = chain(data, "notes")
    made["train"]["validate_rouge"] = True
    made["stages"]["distil"]["evaluate"] = {"valid_limit": 3}
    notes = resolve_chain(made).notes
    assert next(note for note in notes if "valid_limit" in note).startswith(
        "stages.distil.evaluate.valid_limit=3"
    )
    assert resolve_chain(made, ["stages.warm.train.lr=0.5", "train.seed=7"]).stages[0].config.train.lr == 0.5


def test_a_row_of_no_pair_is_found_before_the_first_stage(data: Path) -> None:
    bad = data / "no-pairs.jsonl"
    write_jsonl(bad, [{"prompt": "q", "response": "no pair"}])
    told = refused(data, {"stages.prefer.data": {"train": str(bad)}})
    assert told.startswith("stages.prefer: ")


def test_the_page_and_the_lists_have_all_stages_in_order(straight: Path) -> None:
    runs = load_runs([straight])
    assert [run.folder.name for run in runs] == list(STAGES)
    (table,) = stage_tables(runs[1:])
    assert [row[0].text for row in table.rows] == list(STAGES)
    whole, int4 = (row[table.columns.index(next(c for c in table.columns if c.heading == "Leaves"))]
                   for row in table.rows[2:4])  # fmt: skip
    assert int4.value < whole.value
    assert "×)" in int4.text
    assert "Stages of straight" in (straight / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ModelError, match="is a chain of runs"):
        resolve_path(str(straight))
