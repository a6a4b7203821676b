"""A model learns to name what is on photographs: scikit-learn's two, and other, overlapping crops of them.

Both are under CC BY 2.0: china.jpg by danielbuechele, flower.jpg by vultilion (flickr.com).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

import stillhouse
from stillhouse.files import read_jsonl, write_jsonl
from tests.vision_models import vision_model


def rows(folder: Path, name: str, count: int, left: int, right: int, seed: int) -> Path:
    """Questions about crops whose left edge lies in a part of the photographs, answered by what is there."""
    rng, found = random.Random(seed), []
    for number in range(count):
        subject = ("temple", "flower")[number % 2]
        photograph = Image.fromarray(load_sample_images().images[number % 2])
        x, y = rng.randrange(left, right), rng.randrange(160)
        file = f"{name}-{number}.jpg"
        photograph.crop((x, y, x + 240, y + 240)).save(folder / file, quality=90)
        found.append({"prompt": "<image>What is it?", "images": [file], "response": subject})
    write_jsonl(folder / f"{name}.jsonl", found)
    return folder / f"{name}.jsonl"


def test_a_student_names_what_is_on_photographs(tmp_path: Path) -> None:
    student = vision_model(tmp_path / "student", "llava", width=32, tower=16)
    train, held_out = rows(tmp_path, "train", 40, 0, 200, 1), rows(tmp_path, "asked", 12, 280, 400, 2)
    config = {
        "recipe": "sft",
        "name": "names",
        "student": {"path": str(student), "tower": "trained"},
        "data": {
            "train": str(train), "template": "plain", "max_response": 10, "images": {"max_side": 64},
        },
        "train": {"max_steps": 60, "batch_size": 8, "micro_batch_size": 8, "lr": 3e-3, "save_every": "never"},
        "evaluate": {
            "before": False,
            "sampling": {"temperature": 0.0, "max_tokens": 10},
            "tasks": [{"kind": "vqa", "data": str(held_out)}],
        },
        "output": {"folder": str(tmp_path / "run"), "report": False},
    }  # fmt: skip
    folder = stillhouse.run(config).folder
    found = json.loads((folder / "evaluation" / "student-after.asked.json").read_text("utf-8"))["metrics"]
    assert found["vqa_accuracy"] >= 0.9
    (image,) = read_jsonl(folder / "evaluation" / "student-after.asked.jsonl")[0]["images"]
    assert image["path"].endswith("asked-0.jpg")
    assert image["limits"] == {"max_side": 64, "max_pixels": None}
