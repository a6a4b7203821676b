"""DPO as a run: its first loss is log 2, no pair is refused, exchanged pairs are reverse DPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillhouse import run
from stillhouse.errors import ConfigError, DataError
from stillhouse.files import read_jsonl, write_jsonl
from stillhouse.runs.resolve import resolve
from tests.small_runs import TEACHER, rows_of, tree_of_recipe, write_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path, rows=24, valid=4)
    return tmp_path


def config(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Three steps from the demonstration's teacher, which is the reference too."""
    train = {"max_steps": 3, "lr": 1e-4, "log_every": 1, "validate_every": "never", "save_every": "never"}
    made = tree_of_recipe(folder, "dpo", student={"path": TEACHER}, train=train)
    made["teachers"]["reference"]["dtype"] = "float32"  # stored in bfloat16
    made |= {"name": name, "output": {"folder": str(folder / name), "report": False}, **changes}
    return {**made, "evaluate": {"before": False, "limit": 1, "sampling": {"max_tokens": 2}}}


def student(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "student" / "model.safetensors")


def test_exchanged_pairs_are_those_written_the_other_way_round(folder: Path) -> None:
    made = config(folder, "written")
    rows = read_jsonl(folder / "pairs.jsonl")
    other = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write_jsonl(folder / "other.jsonl", other)
    made["data"] = {**made["data"], "train": str(folder / "other.jsonl")}
    run(made)
    run(config(folder, "swapped", responses={"swap": True}))
    run(config(folder, "straight"))
    swapped, written, straight = (student(folder, name) for name in ("swapped", "written", "straight"))
    assert all(torch.equal(swapped[name], written[name]) for name in swapped)
    assert any(not torch.equal(swapped[name], straight[name]) for name in swapped)
    first, *_, last = (row["loss"] for row in rows_of(folder / "straight"))
    assert first == pytest.approx(0.693147, abs=1e-5)  # log 2: nothing has moved yet
    assert last != first


def test_a_reference_that_is_the_start_is_nothing_to_warn_of(folder: Path) -> None:
    assert not any("same model" in note for note in resolve(config(folder, "run")).notes)
    teacher = {"kind": "live", "path": TEACHER}
    made = {**config(folder, "run"), "recipe": "kd", "teacher": teacher, "teachers": {}}
    assert any("same model" in note for note in resolve(made).notes)


def test_what_is_missing_is_said_before_anything_is_trained(folder: Path) -> None:
    made = config(folder, "run")
    with pytest.raises(ConfigError, match=r"teachers\.reference.*\{kind: live, path: FOLDER\}"):
        run({**made, "teachers": {}})
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "q", "response": "no pair"}])
    with pytest.raises(DataError, match=r"data\.train needs a preference pair in each row"):
        run(made)
    assert not (folder / "run").exists()
