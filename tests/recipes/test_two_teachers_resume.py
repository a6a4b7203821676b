"""Recipes with a preference-trained teacher and a reference end the same, killed and resumed or straight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.small_runs import differences, in_child, nth, outcome, tree, tree_of_recipe, write_data

SHORT = {"max_steps": 5, "save_every": 2, "lr": 3e-3, "validate_every": "never"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a student after some steps, which plays the reference."""
    made = tmp_path_factory.mktemp("two-teachers")
    write_data(made)
    config = tree(made, "second", recipe="sft", train={**SHORT, "lr": 1e-2, "save_every": "never"})
    del config["teacher"]
    assert in_child(config) == 0
    return made


def named(folder: Path, recipe: str, name: str) -> dict[str, Any]:
    made = tree_of_recipe(folder, recipe, str(folder / "second" / "student"), train=SHORT)
    return {**made, "name": name, "output": {"folder": str(folder / name), "report": False}}


@pytest.mark.parametrize("recipe", ["dckd", "adpa", "aligndistil"])
def test_resumed_is_straight(folder: Path, recipe: str) -> None:
    straight, killed = f"{recipe}-straight", f"{recipe}-killed"
    assert in_child(named(folder, recipe, straight)) == 0
    assert in_child(named(folder, recipe, killed), die=nth(2, "open", "optimizer.pt")) < 0
    assert in_child(named(folder, recipe, killed), resume=True) == 0
    assert not differences(outcome(folder / straight), outcome(folder / killed))
