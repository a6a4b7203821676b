"""A micro-batch of every recipe asks nothing of the device, from the token ids to the gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.no_sync import NoHostSync
from tests.small_runs import tree, write_data

from stillhouse import recipes
from stillhouse.core.types import Progress
from stillhouse.runs.build import assemble, make_step
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.resolve import resolve

NAMES = [recipe.name for recipe in recipes.all_recipes()]
AHEAD: dict[str, dict[str, Any]] = {
    "distillm": {"responses": {"student_share": 1.0}},
    "distillm_released": {"responses": {"student_share": 1.0, "capacity": 64, "minimum_fill": 0}},
}
"""What puts the first step where the recipe's own path is taken."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("no-sync")
    write_data(made, rows=12)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_asked_of_the_device(folder: Path, name: str) -> None:
    config = tree(folder, name, recipe=name, **AHEAD.get(name, {}))
    if name == "sft":
        del config["teacher"]
    parts = assemble(resolve(config).config)
    step = make_step(parts, RunFolder(folder / name))
    parts.student.train()
    late = Progress(step=8, max_steps=9, epoch=1.6, epochs=1.8)  # rules that begin later have begun
    prepared = step.with_batch_statistics(parts.student, step.prepare(parts.data.train[:4], late, 2))
    losses = []
    for number, micro in enumerate(prepared.micro_batches):
        if number == 0:  # a model may look things up once, such as whether its head has a bias of -inf
            losses.append(step.loss(parts.student, micro))
            continue
        with NoHostSync():
            losses.append(step.loss(parts.student, micro))
            losses[-1].loss.backward()
    step.finish(prepared, losses)
    assert any(parameter.grad is not None for parameter in parts.student.parameters())
