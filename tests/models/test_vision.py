"""Vision-language models of each family: what they read of images, as transformers alone would."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.no_sync import HostSync, NoHostSync
from tests.vision_models import FAMILIES, Family, image, tokenizer, vision_model
from torch import nn

from stillhouse.core.batch import TokenBatch
from stillhouse.core.images import ImageRef
from stillhouse.errors import ModelError
from stillhouse.models import (
    StudentConfig,
    TeacherModel,
    choose_packing,
    fingerprint_of_files,
    head_of,
    hidden_rows,
    image_arguments,
    image_reader,
    layer_rows,
    load_student,
    load_teacher,
    load_tokenizer,
)
from stillhouse.models.compiling import layers_of
from stillhouse.models.vision import ImageReader

ALL: tuple[Family, ...] = (*FAMILIES, "llava-siglip", "smolvlm", "qwen3_vl")
IMAGES = ((image(0),), (image(1, 16, 40), image(2, 24, 24)), ())
"""Of a row with one, a row with two of other sizes, and one of text alone."""
PROJECTORS = ("projector", "connector", "merger")
ANSWER = (40, 41, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("vision")
    return {family: vision_model(root / family, family) for family in ALL}


def texts(reader: ImageReader) -> list[str]:
    one = reader.image_text
    return [f"ab{one}c", f"x{one} and {one}y", "only text"]


def prompts(reader: ImageReader, words: Any) -> list[tuple[int, ...]]:
    """Token ids with the tokens of the images of `IMAGES`."""
    found = []
    for text, images in zip(texts(reader), IMAGES, strict=True):
        parts = text.split(reader.image_token)
        whole = "".join(map("".join, zip(parts, [*reader.expand(images), ""], strict=True)))
        found.append(tuple(words(whole).input_ids))
    return found


def batch_of(ids: Sequence[tuple[int, ...]], images: Sequence[tuple[ImageRef, ...]]) -> TokenBatch:
    return TokenBatch.of([(*one, *ANSWER) for one in ids], list(map(len, ids)), 0, images=images)


def loaded(folder: Path) -> tuple[nn.Module, ImageReader, Any]:
    model = load_teacher(TeacherModel(path=str(folder)))
    reader = image_reader(model)
    assert reader is not None
    return model, reader, load_tokenizer(TeacherModel(path=str(folder)))


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_a_mixed_batch_is_what_transformers_alone_reads(folders: dict[Family, Path], family: Family) -> None:
    model, reader, words = loaded(folders[family])
    ids = prompts(reader, words)
    batch = batch_of(ids, IMAGES)
    hidden, layers = layer_rows(model, batch, [0.5, 1.0])
    ours = head_of(model).logits(hidden)
    start = 0
    for text, images, own in zip(texts(reader), IMAGES, ids, strict=True):
        shown = {"images": [[one.open() for one in images]]} if images else {}
        inputs = reader.processor(text=[text + words.decode(ANSWER[:2])], return_tensors="pt", **shown)
        assert inputs["input_ids"][0].tolist() == [*own, *ANSWER[:2]]
        theirs = model(**inputs, output_hidden_states=True)
        rows = slice(start, start + len(ANSWER))
        torch.testing.assert_close(ours[rows], theirs.logits[0, -3:].float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layers[0.5][rows], theirs.hidden_states[1][0, -3:], atol=1e-5, rtol=1e-5)
        start += len(ANSWER)
    assert start == len(hidden)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_read_depends_on_the_image_and_on_its_own_row_only(
    folders: dict[Family, Path], family: Family
) -> None:
    model, reader, words = loaded(folders[family])
    ids = prompts(reader, words)
    whole = hidden_rows(model, batch_of(ids, IMAGES))
    other = hidden_rows(model, batch_of(ids, ((image(9),), *IMAGES[1:])))
    rows = len(ANSWER)
    assert (whole[:rows] - other[:rows]).abs().max() > 1e-3
    torch.testing.assert_close(whole[rows:], other[rows:], atol=1e-5, rtol=1e-5)
    batch = batch_of(ids, IMAGES)
    for row in range(3):
        alone = hidden_rows(model, batch.select([row]))
        torch.testing.assert_close(alone, whole[rows * row : rows * (row + 1)], atol=1e-5, rtol=1e-5)


def test_qwen_reads_positions_of_rows_and_columns(folders: dict[Family, Path]) -> None:
    """Without M-RoPE an image of the same patches in another shape would be read alike but for its tokens."""
    model, reader, words = loaded(folders["qwen2_5_vl"])
    ids = prompts(reader, words)
    found = image_arguments(model, ids, IMAGES, max(map(len, ids)))
    positions = found["position_ids"]
    assert positions.shape == (3, 3, max(map(len, ids)))
    text = len(ids[2])
    assert positions[:, 2, :text].tolist() == [list(range(text))] * 3
    first = [index for index, one in enumerate(ids[0]) if one == reader.image_id]
    height, width = (found["image_grid_thw"][0, 1:] // 2).tolist()
    start = first[0]
    assert positions[0, 0, first].tolist() == [start] * len(first)
    assert positions[1, 0, first].tolist() == [start + r for r in range(height) for _ in range(width)]
    assert positions[2, 0, first].tolist() == [start + c for _ in range(height) for c in range(width)]
    assert positions[0, 0, first[-1] + 1] == start + max(height, width)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_tower_and_projector(folders: dict[Family, Path], family: Family) -> None:
    config = StudentConfig(path=str(folders[family]), tower="trained")
    words = load_tokenizer(config)
    model = load_student(config, words, None, seed=0)
    reader = image_reader(model)
    assert reader is not None
    hidden_rows(model, batch_of(prompts(reader, words), IMAGES)).pow(2).sum().backward()
    reached = [
        name
        for name, weights in model.named_parameters()
        if weights.grad is not None and weights.grad.abs().max() > 0
    ]
    for part in (("language_model.layers", "text_model.layers"), ("visi", "visual"), PROJECTORS):
        assert any(word in name for name in reached for word in part), part


class OnlyInModels(NoHostSync):
    """Lets transformers' own models read a number from the device, and nobody else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except HostSync:
            if not any("transformers/models" in frame.filename for frame in traceback.extract_stack()):
                raise
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_model_itself_waits_for_the_device(folders: dict[Family, Path], family: Family) -> None:
    model, reader, words = loaded(folders[family])
    ids = prompts(reader, words)
    reader.tensors([one for images in IMAGES for one in images])  # reading a file needs no device
    batch = batch_of(ids, IMAGES)
    arguments = image_arguments(model, ids, IMAGES, 8 + max(map(len, ids)))
    assert {one.device.type for one in arguments.values()} == {"cpu"}
    model.requires_grad_(True)
    with OnlyInModels():
        hidden_rows(model, batch).sum().backward()


def test_a_prompt_for_another_processor_is_refused(folders: dict[Family, Path]) -> None:
    model, reader, words = loaded(folders["idefics3"])
    ids = prompts(reader, words)
    with pytest.raises(ModelError, match=r"has 20 image tokens, and its 1 images take 12"):
        hidden_rows(model, batch_of(ids[:1], [(image(1, 16, 40),)]))


def test_image_tokens_without_their_image_are_refused(folders: dict[Family, Path]) -> None:
    model, reader, words = loaded(folders["qwen2_5_vl"])
    ids = prompts(reader, words)
    with pytest.raises(ModelError, match="came without image"):
        hidden_rows(model, batch_of(ids[:1], [()]))
    written = TokenBatch.of([(50, 60, reader.image_id)], [2], 0)
    assert hidden_rows(model, written).shape[0] == 1  # a student may write one


def test_a_text_model_refuses_images(tmp_path: Path) -> None:
    from tests.tiny import model

    with pytest.raises(ModelError, match="reads no images"):
        hidden_rows(model(0), batch_of([(5, 6)], [(image(0),)]))


def test_a_folder_without_processor_files_is_refused_when_an_image_comes(tmp_path: Path) -> None:
    folder = vision_model(tmp_path / "bare", "llava")
    (folder / "processor_config.json").unlink()
    model = load_teacher(TeacherModel(path=str(folder)))
    assert hidden_rows(model, batch_of([(50, 60)], [()])).shape[0] == 3
    reader = image_reader(model)
    assert reader is not None
    with pytest.raises(ModelError, match=r"bare: .*image processor"):
        reader.expand([image(0)])


def test_processed_images_are_kept_within_a_limit(
    folders: dict[Family, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reader, _ = loaded(folders["llava"])
    size = 3 * 16 * 16 * 4
    monkeypatch.setattr("stillhouse.models.vision.CACHED_BYTES", 3 * size)
    images = [image(seed) for seed in range(6)]
    alone = [reader.tensors([one])["pixel_values"] for one in images]
    assert len(reader._kept) == 3
    assert torch.equal(reader.tensors(images)["pixel_values"], torch.cat(alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_from_random_weights_reads_through_the_teachers_processor(
    folders: dict[Family, Path], family: Family
) -> None:
    teacher, reader, words = loaded(folders[family])
    source: Any = teacher.config
    given = source.to_dict()
    text, vision = given["text_config"], given["vision_config"]
    options = {
        "model_type": source.model_type,
        "text_config": {
            name: text[name]
            for name in ("model_type", "rope_parameters")
            if family == "qwen2_5_vl" or name != "rope_parameters"
        }
        | {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 1}
        | {"num_key_value_heads": 1},
        "vision_config": {name: value for name, value in vision.items() if name != "transformers_version"},
    }
    if family == "qwen2_5_vl":
        options["vision_config"]["out_hidden_size"] = 8
    config = StudentConfig(from_config=options)
    student = load_student(config, words, teacher, seed=0)
    own = image_reader(student)
    assert own is not None
    assert own.image_id == reader.image_id
    ids = prompts(reader, words)
    assert hidden_rows(student, batch_of(ids, IMAGES)).shape == (9, 8)
    with pytest.raises(ModelError, match=r"student\.processor: .*random weights"):
        load_student(config, words, None, seed=0)


def test_the_fingerprint_of_a_teacher_changes_with_its_processor(tmp_path: Path) -> None:
    folder = vision_model(tmp_path / "teacher", "llava")
    model = TeacherModel(path=str(folder))
    before = fingerprint_of_files(model)
    assert fingerprint_of_files(model) == before
    other = tmp_path / "other"
    other.mkdir()
    text = (folder / "processor_config.json").read_text()
    (other / "processor_config.json").write_text(text.replace('"shortest_edge": 16', '"shortest_edge": 20'))
    through_other = fingerprint_of_files(TeacherModel(path=str(folder), processor=str(other)))
    (folder / "processor_config.json").write_text((other / "processor_config.json").read_text())
    assert len({before, through_other, fingerprint_of_files(model)}) == 3


def test_packing_is_off_in_words(folders: dict[Family, Path]) -> None:
    model, reader, words = loaded(folders["qwen2_5_vl"])
    note = choose_packing(model, "on")
    assert note is not None
    assert "cannot pack" in note
    assert "it reads images" in note
    hidden_rows(model, batch_of(prompts(reader, words), IMAGES))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_to_compile_are_the_language_models(folders: dict[Family, Path], family: Family) -> None:
    model, _, _ = loaded(folders[family])  # the tower has as many
    names = {name for name, module in model.named_modules() if module is layers_of(model)}
    assert all("language_model" in name or "text_model" in name for name in names)
    assert names


def test_unknown_fields_of_a_part_are_named() -> None:
    words = tokenizer()
    options = {"model_type": "llava", "text_config": {"model_type": "llama", "hiden_size": 8}}
    with pytest.raises(ModelError, match=r"from_config\.text_config\.hiden_size: llama has no such field"):
        load_student(StudentConfig(from_config=options), words, None, seed=0)
