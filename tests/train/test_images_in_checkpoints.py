"""What a run keeps of rows with images: weights under the model's own names, and digests, no pixels."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.vision_models import FAMILIES, Family, image, vision_model
from transformers import AutoModelForImageTextToText

from stillhouse.core.types import Prompt, Response
from stillhouse.data.collate import collate
from stillhouse.errors import DataError
from stillhouse.rollouts.hidden_cache import TeacherHiddenCache
from stillhouse.rollouts.replay import pack, unpack
from stillhouse.teachers.cached_teachers import concatenated
from stillhouse.teachers.read_through import content_keys
from stillhouse.train.checkpoints import load_renamed


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_whatever_transformers_calls_them(tmp_path: Path, family: Family) -> None:
    model = AutoModelForImageTextToText.from_pretrained(vision_model(tmp_path / "model", family))
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.load_state_dict(
        load_file(tmp_path / "checkpoint" / "model.safetensors"), strict=False
    )  # the Trainer
    load_renamed(model, tmp_path / "checkpoint")
    assert all(model.state_dict()[name].equal(value) for name, value in wanted.items())


def response(*images: int) -> Response:
    prompt = replace(tiny.prompts(1)[0], images=tuple(image(seed) for seed in images))
    return Response(prompt, (5, tiny.END), "student", student_version=3)


def keys(*responses: Response) -> list[str]:
    return content_keys(collate(responses, tiny.PAD))


def test_a_teachers_cache_knows_images_by_their_pixels() -> None:
    (text,), (one,), (other,), (two,) = (keys(response(*shown)) for shown in ((), (1,), (2,), (1, 2)))
    assert len({text, one, other, two}) == 4
    assert keys(response(1), response()) == [one, text]
    assert keys(response(2, 1)) != [two]
    parts = [collate([response(1)], tiny.PAD), collate([response()], tiny.PAD)]
    assert content_keys(concatenated(parts)) == [one, text]


def test_a_buffer_keeps_references_and_refuses_other_pixels() -> None:
    kept = [response(1), response()]
    kept[1] = replace(kept[1], prompt=replace(kept[1].prompt, id="train:1"))
    state = pack(kept)
    assert image(1).digest.encode() in pickle.dumps(state["images"])
    assert len(pickle.dumps(state["images"])) < 200
    prompts: dict[str, Prompt] = {one.prompt.id: one.prompt for one in kept}
    assert unpack(state, prompts) == kept
    changed = prompts | {"train:0": response(2).prompt}
    with pytest.raises(DataError, match="train:0, which the training data has with other images"):
        unpack(state, changed)


def test_hidden_states_are_those_of_the_same_picture() -> None:
    cache = TeacherHiddenCache()
    cache.retain(response(1))
    assert cache.slot(response(1)) == 0
    assert cache.slot(response(2)) == cache.slot(response()) == -1
