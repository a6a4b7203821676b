"""A micro-batch of every recipe asks nothing of the device, from the token ids to the gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.no_sync import NoHostSync
from tests.recipe_steps import prepared
from tests.small_runs import write_data

from stillhouse import recipes

NAMES = [recipe.name for recipe in recipes.all_recipes()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("no-sync")
    write_data(made, rows=12)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_asked_of_the_device(folder: Path, name: str) -> None:
    parts, step, made = prepared(folder, name)
    losses = []
    for number, micro in enumerate(made.micro_batches):
        if number == 0:  # a model may look things up once, such as whether its head has a bias of -inf
            losses.append(step.loss(parts.student, micro))
            continue
        with NoHostSync():
            losses.append(step.loss(parts.student, micro))
            losses[-1].loss.backward()
    step.finish(made, losses)
    assert any(parameter.grad is not None for parameter in parts.student.parameters())
