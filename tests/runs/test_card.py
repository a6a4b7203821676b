"""The card of an exported student: front matter that the hub understands, and nothing that is not so."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetInfo
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file

from stillhouse.data.datasets import DATASETS
from stillhouse.runs.export.licences import of_data, of_model
from tests.devices import same_tensors
from tests.workshop import Workshop

RUN = ("run", "run.yaml", "train.max_steps=2", "evaluate.before=true", "evaluate.teacher=true")


def card_of(workshop: Workshop, *more: str) -> ModelCard:
    said = workshop.stillhouse(*RUN, *more)
    assert said.code == 0, said.err
    return ModelCard.load(workshop.folder / "runs/kd/student/README.md")


def test_the_card_says_how_the_student_came_to_be(workshop: Workshop) -> None:
    (workshop.folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n", encoding="utf-8")
    card = card_of(workshop, "output.licence.student=Apache-2.0", "output.licence.teacher=llama3.2")
    assert isinstance(card.data, ModelCardData)
    assert card.data.license == "apache-2.0"
    assert card.data.to_dict()["library_name"] == "transformers"
    assert {"distillation", "kd"} <= set(card.data.tags or [])
    after = json.loads((workshop.folder / "runs/kd/evaluation/student-after.json").read_text())["metrics"]
    (result,) = card.data.eval_results or []
    assert result.metric_value == pytest.approx(after["rouge_l"], abs=1e-3)
    text = card.content
    for words in (
        "Forward KL to the teacher", "Hinton et al. 2015 (arXiv 1503.02531)", r"KL(p \|\| q)", "forward_kl",
        "| teacher |", "| student before |", "optimiser steps: 2", "Sampling: {temperature: 0.0", "torch 2.",
        "this model: Apache-2.0", "teacher: llama3.2", "data: train: cc-by-4.0",
        "| train | train.jsonl | 24 | 24 |", "what it started from: not known",
    ):  # fmt: skip
        assert words in text, words
    assert str(workshop.folder) not in text


def test_the_yaml_of_the_card_makes_the_same_student_again(workshop: Workshop) -> None:
    card = card_of(workshop)
    (text,) = re.findall(r"```yaml\n(.*?)```", card.content, flags=re.DOTALL)
    again: dict[str, Any] = yaml.safe_load(text)
    assert again["train"]["max_steps"] == 2
    assert "objective" not in again  # the recipe says it
    (workshop.folder / "again.yaml").write_text(text, encoding="utf-8")
    said = workshop.stillhouse("run", "again.yaml", "name=again", "output.report=false")
    assert said.code == 0, said.err
    weights = [
        load_file(workshop.folder / f"runs/{name}/student/model.safetensors") for name in ("kd", "again")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(same_tensors(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_card_warns_of_what_concerns_its_student(workshop: Workshop) -> None:
    card = card_of(workshop, "evaluate.before=false")
    assert "learns from its teacher's outputs and from the data: their terms" in card.content
    assert "are shortened" not in card.content
    shutil.rmtree(workshop.folder / "runs")
    alone = ("recipe=sft", "teacher=null", "evaluate.teacher=false")
    card = card_of(workshop, "evaluate.before=false", *alone, f"data.train={workshop.folder}/train.jsonl")
    assert "learns from the data: their terms" in card.content
    assert "absolute paths are shortened" in card.content


def test_a_licence_of_ones_own_is_named(workshop: Workshop) -> None:
    card = card_of(workshop, "output.licence.student=For our lab only", "evaluate.before=false")
    assert card.data.license == "other"
    assert card.data.license_name == "For our lab only"  # type: ignore[attr-defined]


def test_licences_are_found_beside_the_files(tmp_path) -> None:
    assert of_model("package:stillhouse/demo/teacher") == "cc-by-sa-4.0"
    assert (
        of_data(DATASETS.parse({"kind": "jsonl", "path": "package:stillhouse/demo/data/train.jsonl"}))
        == "cc-by-sa-4.0"
    )
    saved, source = tmp_path / "saved", {"kind": "hf", "path": str(tmp_path / "saved")}
    info = DatasetInfo(license="odc-by")
    Dataset.from_dict({"prompt": ["p"], "response": ["r"]}, info=info).save_to_disk(str(saved))
    assert of_data(DATASETS.parse(source)) == "odc-by"
    for broken in ("[]", "{", '{"license": 5}'):
        (saved / "dataset_info.json").write_text(broken, encoding="utf-8")
        assert of_data(DATASETS.parse(source)) in (None, "5")
    (saved / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\n", encoding="utf-8")
    (saved / "dataset_info.json").unlink()
    assert of_data(DATASETS.parse(source)) == "mit, cc-by-4.0"
    (tmp_path / "README.md").write_text("---\n: [broken\n---\n", encoding="utf-8")
    assert of_model(str(tmp_path)) is None
    assert of_model("no such/hub name/at all") is None
