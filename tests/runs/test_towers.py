"""What `check` says of images: their tokens, and the memory that vision towers take for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.types import Prompt
from stillhouse.models import LoraConfig, StudentConfig, TeacherModel
from stillhouse.models.readers import model_reader, student_reader
from stillhouse.runs.memory import Workload, memory_by_phase, most_memory
from stillhouse.runs.model_sizes import ModelSize, model_size, student_size
from stillhouse.runs.resolve import resolve
from stillhouse.runs.towers import image_rows
from tests.vision_models import FAMILIES, Family, image, tokenizer, vision_model

PROMPTS = (
    Prompt("train:0", tuple(range(40, 50)), "", response_ids=(50, 1), images=(image(0), image(1, 16, 40))),
    Prompt("train:1", tuple(range(40, 52)), "", teacher_ids=tuple(range(40, 70)), response_ids=(50, 1)),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("towers")
    return {family: vision_model(root / family, family) for family in FAMILIES}


@pytest.mark.parametrize(
    ("family", "patches"), [("llava", 2 * 16), ("idefics3", (20 + 12) * 4), ("qwen2_5_vl", (6 + 10) * 4)]
)
def test_the_patches_of_the_row_with_most_images_count(
    folders: dict[Family, Path], family: Family, patches: int
) -> None:
    model = TeacherModel(path=str(folders[family]))
    tower = model_size(model, PROMPTS).tower
    assert tower is not None
    assert (tower.layers, tower.hidden_size, tower.patches, tower.trained) == (2, 16, patches, False)
    assert tower.more_tokens == 30 - 12
    rows = image_rows(PROMPTS, model_reader(model))
    merge = 1 if family == "llava" else 4
    assert rows == {
        "images": 2,
        "rows with images": 1,
        "image tokens": patches // merge,
        "image tokens of a row, at most": patches // merge,
    }


def test_rows_of_text_need_no_tower(folders: dict[Family, Path]) -> None:
    model = TeacherModel(path=str(folders["llava"]))
    assert model_size(model, PROMPTS[1:]).tower is None
    assert image_rows(PROMPTS[1:], model_reader(model)) == {}


def test_what_is_trained_of_a_student_counts_and_costs(folders: dict[Family, Path], tmp_path: Path) -> None:
    words = tokenizer()

    def size(**options: Any) -> ModelSize:
        student = StudentConfig(path=str(folders["llava"]), **options)
        return student_size(student, None, len(words), student_reader(student, words, None), PROMPTS)

    frozen, trained = size(), size(tower="trained")
    lora = size(lora=LoraConfig(rank=2, parts=("tower",)))
    assert frozen.trainable is not None
    assert trained.trainable is None
    assert 0 < frozen.trainable < frozen.parameters == trained.parameters
    assert lora.tower is not None
    assert lora.tower.trained
    config = resolve(
        {
            "recipe": "sft",
            "student": {"path": str(folders["llava"])},
            "data": {"train": str(tmp_path / "rows.jsonl")},
        }
    ).config
    texts = student_size(StudentConfig(path=str(folders["llava"])), None, len(words))
    needed = [
        most_memory(memory_by_phase(config, one, (), Workload(512))) for one in (texts, frozen, trained)
    ]
    assert needed == sorted(set(needed))
