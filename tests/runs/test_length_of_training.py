"""What begins or moves only after the end of the training is told, whether steps or epochs decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import ConfigError
from stillhouse.runs.checks import check_length
from stillhouse.runs.execute import execute
from stillhouse.runs.resolve import resolve
from stillhouse.train.config import due
from tests.small_runs import tree, write_data

TREE: dict[str, Any] = {
    "student": {"path": "student"},
    "teacher": {"kind": "live", "path": "teacher"},
    "data": {"train": "train.jsonl", "valid": "valid.jsonl"},
}


@pytest.mark.parametrize("length", ["train.max_steps=6", "train.epochs=0.5"])
def test_a_rule_that_would_never_begin_is_refused_for_steps_and_epochs(length: str) -> None:
    """The alpha rule begins after one pass; 320 prompts are 10 steps of 32."""
    with pytest.raises(ConfigError, match="would begin after the end of the training"):
        check_length(resolve({**TREE, "recipe": "distillm2"}, [length]).config, 320)


def test_enough_steps_are_enough() -> None:
    config = resolve({**TREE, "recipe": "distillm2"}, ["train.max_steps=11"]).config
    assert check_length(config, 320) == []


def test_a_validation_loss_that_comes_too_late_is_told() -> None:
    late = ["train.validate_every=epoch"]
    (note,) = check_length(resolve({**TREE, "recipe": "distillm"}, late).config, 256)
    assert "never moves" in note
    assert check_length(resolve({**TREE, "recipe": "distillm"}).config, 256) == []
    assert check_length(resolve({**TREE, "recipe": "distillm"}, [*late, "train.epochs=3"]).config, 256) == []
    assert check_length(resolve({**TREE, "recipe": "kd"}, late).config, 256) == []


def test_a_share_of_an_epoch_is_so_many_steps() -> None:
    assert [step for step in range(1, 21) if due(0.25, step, 20, last=False)] == [5, 10, 15, 20]
    assert [step for step in range(1, 5) if due(0.1, step, 4, last=False)] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="lies between 0 and 1"):
        resolve({**TREE, "recipe": "kd"}, ["train.validate_every=1.5"])


DEFAULTS = ("max_steps", "validate_every")
"""What the recipe is to decide."""


@pytest.mark.parametrize("recipe", ["distillm", "distillm_released"])
def test_phi_moves_in_one_epoch_and_what_stays_is_in_the_record(recipe: str, tmp_path: Path) -> None:
    write_data(tmp_path)
    changes = {
        "train": {"epochs": 1.0, "batch_size": 2, "micro_batch_size": 2, "lr": 0.2, "validate_rouge": False}
    }
    given = tree(tmp_path, recipe, **changes)
    given["train"] = {name: value for name, value in given["train"].items() if name not in DEFAULTS}
    result = execute(resolve({**given, "recipe": recipe}))
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    shares = [row["schedule/responses.student_share"] for row in rows if row["phase"] == "train"]
    assert max(shares) > 0
    state = json.loads((result.folder / "state.json").read_text())
    assert state["unmoved"] == {}
