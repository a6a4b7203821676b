"""Students cut from a vision-language teacher keep its tower and its projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tests.vision_models import FAMILIES, Family, image, tokenizer, vision_model

from stillhouse.core.batch import TokenBatch
from stillhouse.models import (
    StudentConfig,
    TeacherModel,
    hidden_rows,
    image_reader,
    load_student,
    load_teacher,
)
from stillhouse.models.parts import parts_of

IMAGE = image(4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("cut")
    return {family: vision_model(root / family, family, layers=3) for family in (*FAMILIES, "qwen3_vl")}


def cut(folder: Path, **options: Any) -> tuple[Any, Any]:
    teacher = load_teacher(TeacherModel(path=str(folder)))
    config = TypeAdapter(StudentConfig).validate_python({"from_teacher": options})
    return load_student(config, tokenizer(), teacher, seed=0), teacher


def reads(model: Any) -> torch.Tensor:
    reader = image_reader(model)
    assert reader is not None
    ids = tuple(reader.processor.tokenizer(f"a{reader.expand([IMAGE])[0]}b").input_ids)
    return hidden_rows(model, TokenBatch.of([ids], [len(ids) - 1], pad_id=0, images=[(IMAGE,)]))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl"])
def test_fewer_layers_keep_tower_and_projector(folders: dict[Family, Path], family: Family) -> None:
    student, teacher = cut(folders[family], layers=(0, 2))
    assert student.config.get_text_config().num_hidden_layers == 2
    assert teacher.config.get_text_config().num_hidden_layers == 3
    weights, compared = teacher.state_dict(), 0
    for name, part in parts_of(student).items():
        if part != "language":
            compared += 1
            assert torch.equal(student.get_parameter(name), weights[name]), name
    assert compared > 10
    assert not any(
        student.get_parameter(n).requires_grad for n, p in parts_of(student).items() if p == "tower"
    )
    assert reads(student).shape == (1, 16)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl"])
def test_all_layers_are_the_teacher(folders: dict[Family, Path], family: Family) -> None:
    student, teacher = cut(folders[family], layers=(0, 1, 2))
    torch.testing.assert_close(reads(student), reads(teacher))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl"])
@pytest.mark.parametrize(("name", "size"), [("intermediate_size", 16), ("hidden_size", 8)])
def test_a_narrower_language_model_still_sees(
    folders: dict[Family, Path], family: Family, name: str, size: int
) -> None:
    student, teacher = cut(folders[family], choose="even", **{name: size})
    assert getattr(student.config.get_text_config(), name) == size
    weights = teacher.state_dict()
    towers = [name for name, part in parts_of(student).items() if part == "tower"]
    assert all(torch.equal(student.get_parameter(name), weights[name]) for name in towers)
    assert reads(student).shape[1] == (size if name == "hidden_size" else 16)
