"""Packed sequences give every recipe the loss and gradient of padded ones, and wait for no device either."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.no_sync import NoHostSync
from tests.recipe_steps import prepared
from tests.small_runs import TEACHER, write_data
from torch import Tensor

from stillhouse import recipes
from stillhouse.models import choose_packing
from stillhouse.models.packing import packs
from stillhouse.runs.build import Parts
from stillhouse.train.micro_batch import PreparedStep
from stillhouse.train.step import Step

NAMES = [recipe.name for recipe in recipes.all_recipes()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("packed")
    write_data(made, rows=12)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_those_of_padded_batches(folder: Path, name: str) -> None:
    teacher = {"kind": "live", "path": TEACHER, "dtype": "float32"}
    parts, step, made = prepared(folder, name, teacher=teacher, train={"packing": "on"})
    models = [model for model in (parts.student, *parts.teachers.values()) if model is not None]
    assert all(packs(model) for model in models)
    parts.student.eval()  # dropout would draw other numbers for other shapes
    assert any(micro.batch.padded for micro in made.micro_batches)
    with NoHostSync():
        [micro] = made.micro_batches[-1:]
        step.loss(parts.student, micro).loss.backward()
    packed = _gradient(parts, step, made)
    for model in models:
        choose_packing(model, "off")
    torch.testing.assert_close(packed, _gradient(parts, step, made), rtol=1e-4, atol=1e-6)


def _gradient(parts: Parts, step: Step, made: PreparedStep) -> Tensor:
    """The loss, and the gradient behind it."""
    parts.student.zero_grad()
    losses = [step.loss(parts.student, micro).loss for micro in made.micro_batches]
    torch.stack(losses).sum().backward()
    slopes = [p.grad.flatten() for p in parts.student.parameters() if p.grad is not None]
    return torch.cat([torch.stack(losses).sum().detach()[None], *slopes])
