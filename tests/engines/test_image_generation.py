"""Prompts with images: what is written is what transformers' `generate` writes, whatever shares a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vision_models import FAMILIES, image, vision_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from stillhouse.core.images import ImageRef
from stillhouse.engines import Sampling, TokenizerInfo, TransformersConfig
from stillhouse.engines.mixture import MixtureEngine, MixtureModel
from stillhouse.engines.transformers import TransformersEngine
from stillhouse.errors import EngineError, ModelError
from stillhouse.models import load_teacher, load_tokenizer
from stillhouse.models.config import TeacherModel
from stillhouse.models.hidden import image_reader
from stillhouse.models.vision import ImageReader, attach_reader

GREEDY = Sampling(temperature=0.0, max_tokens=12)
IMAGES: tuple[tuple[ImageRef, ...], ...] = (
    (image(1),),
    (),
    (image(2, 16, 16), image(3, 40, 24)),
    (image(4, 12, 33),),
    (),
    (image(5),),
)
QUESTIONS = ("what?", "hello", "which of both is red?", "a", "and without a picture, what is there?", "")


class Given:
    """A model with prompts of its own expansion."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = load_teacher(TeacherModel(path=str(folder)))
        reader = image_reader(self.model)
        assert reader is not None
        self.reader: ImageReader = reader
        self.words = load_tokenizer(TeacherModel(path=str(folder)))
        self.info = TokenizerInfo.from_tokenizer(self.words)
        start, end = self.reader.image_text.split(self.reader.image_token)
        self.prompts = []
        for question, images in zip(QUESTIONS, IMAGES, strict=True):
            text = "".join(f"{start}{expanded}{end}" for expanded in self.reader.expand(images))
            self.prompts.append(self.words(f"{text}{question}:").input_ids)

    def write(self, **options: Any) -> list[tuple[int, ...]]:
        engine = TransformersConfig(**options).build(self.model, self.info)
        return [one.token_ids for one in engine.generate(self.prompts, GREEDY, 0, images=IMAGES)]

    def written_by_transformers(self, place: int) -> tuple[int, ...]:
        """Through the processor, from the text with one token for each image, alone; never an image token."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=GREEDY.max_tokens,
            eos_token_id=self.info.eos_ids[0],
            suppress_tokens=[self.reader.image_id],
        )
        shown = [one.open() for one in IMAGES[place]] or None
        text = self.reader.image_text * len(IMAGES[place]) + QUESTIONS[place] + ":"
        inputs = self.reader.processor(text=[text], images=shown, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == self.prompts[place]
        output = self.model.generate(**inputs, generation_config=config)
        return tuple(output[0, len(self.prompts[place]) :].tolist())


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Given]:
    folder = tmp_path_factory.mktemp("models")
    return {family: Given(vision_model(folder / family, family)) for family in (*FAMILIES, "qwen3_vl")}


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl"])
def test_greedy_is_that_of_generate_token_for_token(given: dict[str, Given], family: str) -> None:
    one = given[family]
    expected = [one.written_by_transformers(place) for place in range(len(IMAGES))]
    assert len(set(expected)) > 3
    assert not any(one.reader.image_id in text for text in expected)
    assert one.write() == expected
    assert one.write(batch_size=2) == expected  # rows are refilled while others go on
    static = TransformersEngine(one.model, one.info, batch_size=4, kv_cache="static")
    fixed = static.generate(one.prompts, GREEDY, 0, images=IMAGES)
    assert [done.token_ids for done in fixed] == expected
    assert not static._static.refused


@pytest.mark.parametrize("family", FAMILIES)
def test_the_picture_is_seen(given: dict[str, Given], family: str) -> None:
    one = given[family]
    engine = TransformersConfig().build(one.model, one.info)
    sampling = Sampling(temperature=1.0, max_tokens=6, logprobs=True)
    scores = [
        engine.generate([one.prompts[0]], sampling, 0, images=[(shown,)])[0].logprobs
        for shown in (image(1), image(9))
    ]
    assert scores[0] != scores[1]


def test_a_mixture_of_two_towers_samples_from_both(tmp_path: Path, given: dict[str, Given]) -> None:
    one = given["llava"]
    other = Given(vision_model(tmp_path / "other", "llava", seed=1, tower=24))
    vocab = len(one.words)

    def mixed(share: float) -> list[tuple[int, ...]]:
        engine = MixtureEngine(MixtureModel(one.model, other.model, share, vocab), one.info, batch_size=4)
        return [done.token_ids for done in engine.generate(one.prompts, GREEDY, 0, images=IMAGES)]

    assert mixed(1e-9) == one.write()
    assert mixed(1 - 1e-9) == other.write()
    tiles = given["idefics3"]
    engine = MixtureEngine(MixtureModel(one.model, tiles.model, 0.5, vocab), one.info)
    with pytest.raises(EngineError, match="teacher_share: 0"):
        engine.generate(one.prompts, GREEDY, 0, images=IMAGES)


def test_what_reads_no_images_says_so(given: dict[str, Given], text_only: nn.Module) -> None:
    one = given["llava"]
    with pytest.raises(ModelError, match="reads no images"):
        TransformersEngine(text_only, one.info).generate(one.prompts, GREEDY, 0, images=IMAGES)
    with pytest.raises(ModelError, match="written for another processor"):
        TransformersEngine(one.model, one.info).generate([[20, 21]], GREEDY, 0, images=[(image(1),)])


@pytest.fixture
def text_only() -> nn.Module:
    from tests import tiny

    return tiny.model(0, vocab_size=400)


def test_layers_that_are_no_attention_decode_by_generate(given: dict[str, Given]) -> None:
    """Qwen3.5: linear attention between full one, M-RoPE, and images in a batch of equal lengths."""
    one = given["qwen3_vl"]
    torch.manual_seed(0)
    text = {
        "vocab_size": len(one.words), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    vision = {**one.model.config.vision_config.to_dict(), "out_hidden_size": 32}
    vision.pop("deepstack_visual_indexes")
    vision.pop("model_type")
    ids = {name: getattr(one.model.config, name) for name in ("image_token_id", "video_token_id")}
    ids |= {
        f"vision_{end}_token_id": getattr(one.model.config, f"vision_{end}_token_id")
        for end in ("start", "end")
    }
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, **ids)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    attach_reader(model, ImageReader(one.reader.folder, config, lambda: one.words))
    hybrid = object.__new__(Given)
    hybrid.__dict__ |= {**one.__dict__, "model": model}
    expected = [hybrid.written_by_transformers(place) for place in range(len(IMAGES))]
    assert hybrid.write() == expected
