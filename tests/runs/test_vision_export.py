"""A vision-language student as transformers loads it: processor beside the weights, pipeline, card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import stillhouse
from stillhouse.core.batch import TokenBatch
from stillhouse.files import write_jsonl
from stillhouse.models import TeacherModel, hidden_rows, image_reader, load_teacher
from stillhouse.runs.export.config import ExportConfig
from stillhouse.runs.export.student import read_student
from stillhouse.runs.export.targets import export_student
from tests.vision_models import image, picture, vision_model

ROWS = [{"prompt": f"Number {number}?", "response": f"It is {number}."} for number in range(6)]


def distil(root: Path, family: Any, **student: Any) -> Path:
    """A run of two steps over rows of text; its folder."""
    teacher = vision_model(root / "teacher", family, layers=3)
    write_jsonl(root / "rows.jsonl", ROWS)
    config = {
        "recipe": "kd",
        "name": "seeing",
        "student": student or {"from_teacher": {"layers": [0, 2]}},
        "teacher": {"kind": "live", "path": str(teacher)},
        "data": {"train": str(root / "rows.jsonl"), "max_response": 12},
        "train": {"max_steps": 2, "batch_size": 2, "micro_batch_size": 2, "lr": 0.01},
        "output": {"folder": str(root / "run"), "report": False},
    }
    return stillhouse.run(config).folder


def reads(path: Path) -> torch.Tensor:
    model = load_teacher(TeacherModel(path=str(path)))
    reader = image_reader(model)
    assert reader is not None
    one = image(5)
    ids = tuple(reader.processor.tokenizer(f"a{reader.expand([one])[0]}b").input_ids)
    with torch.no_grad():
        return hidden_rows(model, TokenBatch.of([ids], [len(ids) - 1], pad_id=0, images=[(one,)]))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a LLaVA."""
    return distil(tmp_path_factory.mktemp("seeing"), "llava")


@pytest.mark.parametrize("folder", ["student", "checkpoints/checkpoint-2"])
def test_checkpoint_and_student_are_pipelines(seeing: Path, folder: str) -> None:
    from transformers import pipeline

    source = json.loads((seeing.parent / "teacher" / "processor_config.json").read_text())
    assert json.loads((seeing / folder / "processor_config.json").read_text()) == source
    asks: Any = pipeline("image-text-to-text", model=str(seeing / folder), device="cpu")
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What is it?"}],
        }
    ]
    found = asks(text=turns, max_new_tokens=4, return_full_text=False)
    assert isinstance(found[0]["generated_text"], str)


def test_the_card_says_what_sees(seeing: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    student = seeing / "student"
    assert AutoProcessor.from_pretrained(student).image_processor is not None
    assert AutoModelForImageTextToText.from_pretrained(student).config.text_config.num_hidden_layers == 2
    card = (student / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "A vision-language student" in card
    assert "- Vision tower: `CLIPVisionModel`, " in card
    assert "parameters, as it started" in card
    assert "- Projector: " in card
    assert "- Processor: the one of `teacher`, whose files are in this folder" in card
    assert "AutoModelForImageTextToText" in card


def test_an_adapter_and_its_base_read_images_again(tmp_path: Path) -> None:
    lora = {"rank": 2, "merge": False, "parts": ["language", "projector"]}
    run = distil(tmp_path, "qwen2_5_vl", from_teacher={"layers": [0, 2]}, lora=lora)
    assert (run / "student" / "base" / "processor_config.json").exists()
    assert reads(run).shape == (1, 16)


def test_an_export_of_a_run_keeps_the_processor(seeing: Path, tmp_path: Path) -> None:
    config = ExportConfig(prompt="Number 3?", max_tokens=2, smoke_test=False)
    folder = export_student(seeing, config, tmp_path / "export")
    assert torch.equal(reads(folder), reads(seeing))
    assert "AutoModelForImageTextToText.from_pretrained" in (folder / "smoke_test.py").read_text()
    assert "France" in read_student(seeing, ExportConfig(max_tokens=1)).example.prompt, "no prompt of images"


def test_whoever_may_read_the_other_files_may_read_the_weights(seeing: Path, tmp_path: Path) -> None:
    config = ExportConfig(prompt="Number 3?", max_tokens=2, smoke_test=False)
    folder = export_student(seeing, config, tmp_path / "export")
    weights = [*seeing.rglob("*.safetensors"), *folder.rglob("*.safetensors")]
    assert len(weights) == 3, "checkpoint, student, export"
    for path in weights:
        assert path.stat().st_mode == path.with_name("config.json").stat().st_mode
