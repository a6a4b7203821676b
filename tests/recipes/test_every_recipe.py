"""Every shipped recipe trains a tiny student from a real teacher, and its validation loss falls."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from tests.small_runs import in_child, rows_of, tree, tree_of_recipe, write_data

from stillhouse import recipes

NAMES = [recipe.name for recipe in recipes.all_recipes()]
LONGER = {"max_steps": 24, "micro_batch_size": 8, "validate_every": 24}
"""For methods whose loss falls slowly, or is noisy."""
EXTRA: dict[str, dict[str, Any]] = {
    # So short a run does not over-fit, and the share of student text starts at zero.
    "distillm": {"responses": {"student_share": 0.5}},
    "distillm_released": {"responses": {"student_share": 0.5, "capacity": 64, "minimum_fill": 64}},
    "amid_released": {"responses": {"student_share": 0.5, "capacity": 64, "minimum_fill": 64}},
    # Policy gradients are noisy: less of the future, a smaller step, a student that has begun to learn.
    "minillm": {"objective": {"discount": 0.5}, "train": {"lr": 3e-3}},
    # Far from the teacher every token has a bad reward; a baseline tells the better from the worse.
    "on_policy_distillation": {"objective": {"whiten": True}, "train": {"lr": 3e-3, **LONGER}},
    "skd": {"train": {"max_steps": 12}},
    "cot2align": {
        "data": {"max_response": 20},
        "train": {"max_steps": 8, "batch_size": 8, "micro_batch_size": 8, "validate_every": 8},
    },
    "simper": {"train": {"lr": 3e-3, **LONGER, "log_every": 6}},
    "dpo": {"train": {"lr": 3e-3}},
    # Between models that differ in everything so far an extrapolation leads away from the text.
    "aligndistil": {"objective": {"extrapolation": 0.1}},
    "aligndistil_off_policy": {"objective": {"extrapolation": 0.1}},
}
WARM = {
    "minillm": 10,
    "on_policy_distillation": 10,
    "skd": 40,
    "simper": 80,
    "dpo": 80,
    "self_distillation": 40,
    "unisd": 40,
}
"""Steps of fine-tuning before: enough for text worth training on, few enough to leave something to learn."""
FURTHER = 10
"""Steps of the student that plays every teacher but the main one."""


MARGINS = {"simper": 0.003, "dpo": 0.02, "self_distillation": 0.02, "unisd": 0.01}
"""By how much the training loss falls of methods that the validation loss says little of."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recipes")
    write_data(made, rows=96, valid=24)
    return made


@pytest.fixture(scope="module")
def warm(folder: Path) -> Any:
    """A student after some steps of fine-tuning, as the papers' students start."""

    @functools.cache
    def made(steps: int) -> Path:
        name = f"warm-{steps}"
        config = tree(folder, name, recipe="sft", train={**LENGTH, "max_steps": steps, "lr": 1e-2})
        assert in_child(config) == 0
        return folder / name / "student"

    return made


LENGTH = {
    "max_steps": 16, "batch_size": 16, "micro_batch_size": 16, "lr": 5e-3, "validate_every": 16,
    "save_every": "never", "log_every": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls(folder: Path, warm: Any, name: str) -> None:
    extra = EXTRA.get(name, {})
    further = set(recipes.find(name).teachers) - {"main"}
    config = tree_of_recipe(
        folder,
        name,
        str(warm(FURTHER) if further else ""),
        **{**extra, "train": {**LENGTH, **extra.get("train", {})}},
    )
    if name in WARM:
        config["student"] = {"path": str(warm(WARM[name]))}
    assert in_child(config) == 0
    rows = rows_of(folder / name)
    of_pairs = name in MARGINS  # no text becomes likelier by them: the loss they train is what falls
    losses = [row["loss"] for row in rows if row["phase"] == ("train" if of_pairs else "valid")]
    assert losses[-1] < losses[0] - MARGINS.get(name, 0.02), losses


@pytest.mark.parametrize("name", NAMES)
def test_header_says_what_it_is(name: str) -> None:
    recipe = recipes.find(name)
    assert recipe.header.startswith(f"{name}: ")
    assert recipe.summary.endswith(".")
    assert recipe.paper
    assert "Loss:" in recipe.header
