"""Which parts of a vision-language student are trained: whole weights, adapters, the tower or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.vision_models import FAMILIES, Family, tokenizer, vision_model
from torch import nn

from stillhouse.errors import ModelError
from stillhouse.models import LoraConfig, StudentConfig, load_student, unwrap
from stillhouse.models.parts import parts_of

PAPER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAPER_VISION = ("fc1", "fc2", "out_proj", "linear_1", "linear_2")
"""What DistiLLM-2 adds to its targets for LLaVA: layers of CLIP and of the projector."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("parts")
    return {family: vision_model(root / family, family) for family in (*FAMILIES, "qwen3_vl")}


def student(folder: Path, **options: Any) -> nn.Module:
    return load_student(StudentConfig(path=str(folder), **options), tokenizer(), None, seed=0)


def trained(model: nn.Module) -> dict[str, set[str]]:
    """Of each part the last names of the modules with something to train."""
    inner = unwrap(model)
    found: dict[str, set[str]] = {"language": set(), "projector": set(), "tower": set()}
    for name, part in parts_of(inner).items():
        if inner.get_parameter(name).requires_grad:
            found[part].add(name.split(".lora_")[0].removesuffix(".weight").rpartition(".")[2])
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl"])
def test_every_weight_belongs_to_one_part(folders: dict[Family, Path], family: Family) -> None:
    model = student(folders[family], tower="trained")
    parts = parts_of(model)
    assert set(parts.values()) == {"language", "projector", "tower"}
    for name, part in parts.items():
        if any(word in name for word in ("projector", "connector", "merger")):
            assert part == "projector", name
        elif any(word in name for word in ("lm_head", "language_model", "text_model")):
            assert part == "language", name
        else:
            assert part == "tower", name
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_of_a_pretrained_student_is_frozen_unless_asked_for(
    folders: dict[Family, Path], family: Family
) -> None:
    found = trained(student(folders[family]))
    assert not found["tower"]
    assert found["language"]
    assert found["projector"]


def test_the_papers_targets_reach_language_tower_and_projector_by_name(folders: dict[Family, Path]) -> None:
    found = trained(student(folders["llava"], lora=LoraConfig(rank=2, targets=(*PAPER, *PAPER_VISION))))
    assert found["language"] == set(PAPER)
    assert found["tower"] == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert found["projector"] == {"linear_1", "linear_2"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parts", [None, ("projector",), ("language", "projector"), ("tower",)])
def test_adapters_are_in_the_parts_that_were_asked_for(
    folders: dict[Family, Path], family: Family, parts: tuple[str, ...] | None
) -> None:
    found = trained(student(folders[family], lora=LoraConfig(rank=2, parts=parts)))
    assert {part for part, layers in found.items() if layers} == set(parts or ("language",))
    assert "lm_head" not in found["language"]


def test_a_part_that_no_target_names_is_refused(folders: dict[Family, Path]) -> None:
    lora = LoraConfig(targets=("q_proj",), parts=("language", "projector"))
    with pytest.raises(ModelError, match=r"lora\.parts: projector has no layer .* linear_1"):
        student(folders["llava"], lora=lora)


def test_options_about_images_are_refused_for_a_text_model(tmp_path: Path) -> None:
    from tests.tiny import model

    made: Any = model(0)
    made.save_pretrained(tmp_path / "text")
    for options, named in (
        ({"tower": "trained"}, r"student\.tower: LlamaForCausalLM has no vision tower"),
        ({"processor": str(tmp_path)}, r"student\.processor: LlamaForCausalLM has no vision tower"),
        ({"lora": LoraConfig(parts=("projector",))}, r"lora\.parts: LlamaForCausalLM reads text alone"),
    ):
        with pytest.raises(ModelError, match=named):
            student(tmp_path / "text", **options)


def test_a_trained_tower_beside_adapters_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"set lora\.parts"):
        StudentConfig(path="x", lora=LoraConfig(), tower="trained")


def test_merged_adapters_give_the_same_model(folders: dict[Family, Path]) -> None:
    from tests.vision_models import image

    from stillhouse.core.batch import TokenBatch
    from stillhouse.models import hidden_rows, image_reader

    parts = ("language", "projector", "tower")
    model: Any = student(folders["llava"], lora=LoraConfig(rank=2, parts=parts))
    for name, weights in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weights, std=0.1)
    reader = image_reader(model)
    assert reader is not None
    one = image(3)
    ids = tuple(reader.processor.tokenizer(f"a{reader.expand([one])[0]}b").input_ids)
    batch = TokenBatch.of([ids], [len(ids) - 1], pad_id=0, images=[(one,)])
    with torch.no_grad():
        before = hidden_rows(model.eval(), batch)
        merged = model.merge_and_unload()
        torch.testing.assert_close(hidden_rows(merged, batch), before, atol=1e-5, rtol=1e-5)
