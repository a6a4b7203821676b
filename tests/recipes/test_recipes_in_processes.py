"""Methods with a state (curricula by what is measured, rounds, mixtures) take the same steps in any number of
processes: same schedules, same text, same losses, same weights, with other token counts in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.children import ranks
from tests.small_runs import STUDENT, rows_of, tree_of_recipe, write_data

import stillhouse

CASES: dict[str, dict[str, Any]] = {
    "distillm2": {},
    "taid": {"objective": {"t": {"rate": 0.5, "momentum": 0.1}}},
    "minillm": {},  # of the last step of an epoch two of four processes have no prompt
}
"""Recipe -> what makes its state move in six steps."""
WORLDS = {"taid": "2"}
"""Numbers of processes, of others 2 and 4."""
MOVES = {
    "distillm2": "schedule/objective.teacher_gap",
    "taid": "schedule/objective.t",
}
FACTS = ("loss", "tokens", "sequences")
WITHOUT_DROPOUT = {**STUDENT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def train_all(folder: Path, world: str) -> None:
    for name, changes in CASES.items():
        if world not in ("1", *WORLDS.get(name, "24")):
            continue
        config = tree_of_recipe(folder, name, **changes)
        config["student"]["from_config"] = WITHOUT_DROPOUT
        for teacher in (config.get("teacher"), *config["teachers"].values()):
            if teacher is not None:
                teacher["dtype"] = "float32"  # in bfloat16 what shares a batch may turn a draw
        config["output"]["folder"] = str(folder / f"{name}-{world}")
        config["data"]["max_response"] = 40  # longer than the shortest references
        config["evaluate"] |= {"limit": 1, "sampling": {"max_tokens": 2}}
        train = {"max_steps": 6, "micro_batch_size": 1, "lr": 0.1, "log_every": 1, "hf": {"optim": "sgd"}}
        never = {"validate_every": 2, "save_every": "never"}
        config["train"] |= {**train, **never, **changes.get("train", {})}
        stillhouse.run(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recipes-in-processes")
    write_data(made)
    for count in (1, 2, 4):
        assert ranks(count, train_all, made, str(count)) == [0] * count
    return made


@pytest.mark.parametrize("name", CASES)
def test_it_takes_the_steps_of_one_process(folder: Path, name: str) -> None:
    alone = rows_of(folder / f"{name}-1")
    weights = load_file(folder / f"{name}-1" / "student" / "model.safetensors")
    assert len({row["tokens"] for row in alone if row["phase"] == "train"}) > 1
    if name in MOVES:
        moved = [row[MOVES[name]] for row in alone if MOVES[name] in row]
        assert len(set(moved)) > 1, moved
    for world in WORLDS.get(name, "24"):
        rows = rows_of(folder / f"{name}-{world}")
        assert len(rows) == len(alone)
        for one, other in zip(alone, rows, strict=True):
            for fact in one:
                if fact in FACTS or fact.startswith(("schedule/", "gap/", "loss/")):
                    assert other[fact] == pytest.approx(one[fact], rel=1e-4), (fact, one["step"], world)
        found = load_file(folder / f"{name}-{world}" / "student" / "model.safetensors")
        assert max((found[key] - value).abs().max().item() for key, value in weights.items()) < 1e-4
