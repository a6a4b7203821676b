"""A micro-batch of every recipe asks nothing of the device, from the token ids to the gradients.

Once on a CPU under a mode that refuses to read numbers, once on tensors without numbers, where what is no CPU
takes the paths of a GPU and reading or copying back is impossible.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.no_sync import NoHostSync
from tests.recipe_steps import prepared
from tests.small_runs import write_data

from stillhouse import recipes
from stillhouse.teachers.live import LiveTeacher

NAMES = [recipe.name for recipe in recipes.all_recipes()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("no-sync")
    write_data(made, rows=12)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_asked_of_the_device(folder: Path, name: str) -> None:
    parts, step, made = prepared(folder, name)
    first, second = made.micro_batches
    # A model may look things up once, such as whether its head has a bias of -inf.
    losses = [step.loss(parts.student, first)]
    with NoHostSync():
        losses.append(step.loss(parts.student, second))
        losses[-1].loss.backward()
    step.finish(made, losses)
    assert any(parameter.grad is not None for parameter in parts.student.parameters())


def transports(name: str) -> bool:
    """Without numbers a transport takes all its steps: 20 s and more. The laws have it alone."""
    return "transport" in recipes.find(name).path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in NAMES if not transports(name)])
def test_nor_is_it_where_there_are_no_numbers(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, step, made = prepared(folder, name)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    parts.student.to("meta")
    for teacher in step.teachers.values():
        if isinstance(teacher, LiveTeacher):
            weight = teacher.model.to("meta").get_output_embeddings().weight
            teacher.head = replace(teacher.head, weight=weight)
    first, second = made.micro_batches
    with NoHostSync():
        for micro, following in ((first, second), (second, None)):
            step.loss(parts.student, micro, following).loss.backward()
    assert any(parameter.grad is not None for parameter in parts.student.parameters())
