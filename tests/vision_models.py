"""Vision-language models of three families, small enough for any test, each with its processor and tokenizer.

folder = vision_model(tmp_path / "teacher", "llava", seed=0)   # a folder as a user has one
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from stillhouse.core.images import EncodedImage, ImageRef

Family = Literal["llava", "llava-siglip", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl"]
FAMILIES: tuple[Family, ...] = ("llava", "idefics3", "qwen2_5_vl")
"""One of each kind: a fixed number of image tokens, tiles, and dynamic resolution with M-RoPE."""

PAD, END, IMAGE = "<pad>", "</s>", "<image>"
_QWEN = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
_SPECIAL = (PAD, END, IMAGE, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
SPECIAL_TOKENS = (*_SPECIAL, *_QWEN, *_TILES)

_IMAGE_IN_TEMPLATE = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(family: Family = "llava") -> Any:
    """A token for each byte and the special tokens of all families, so that all share one vocabulary."""
    vocab = {
        token: index
        for index, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))
    }
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END)
    made.chat_template = _TEMPLATE.replace("IMAGE", _IMAGE_IN_TEMPLATE.get(family, IMAGE))
    return made


def config(family: Family, *, width: int = 16, layers: int = 2, tower: int = 16, size: int = 16) -> Any:
    """The transformers config: `size` is the side of the pictures that the tower reads, of patches of 4."""
    words = tokenizer(family)
    text: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision: dict[str, Any] = {
        "hidden_size": tower,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * tower,
        "image_size": size,
        "patch_size": 4,
        "initializer_range": 0.3,
    }
    ids = words.convert_tokens_to_ids
    common = {"tie_word_embeddings": False, "eos_token_id": words.eos_token_id}
    if family in ("llava", "llava-siglip"):
        clip = family == "llava"
        return AutoConfig.for_model(
            "llava",
            text_config={"model_type": "llama" if clip else "qwen2", **text},
            vision_config={"model_type": "clip_vision_model" if clip else "siglip_vision_model", **vision},
            image_token_index=ids(IMAGE),
            vision_feature_layer=-2 if clip else -1,
            vision_feature_select_strategy="default" if clip else "full",
            **common,
        )
    if family in ("idefics3", "smolvlm"):
        return AutoConfig.for_model(
            family,
            text_config={"model_type": "llama", **text},
            vision_config=vision,
            image_token_id=ids(IMAGE),
            scale_factor=2,
            pad_token_id=words.pad_token_id,
            **common,
        )
    half = width // 4  # of a head's pairs, for time, rows and columns
    sections = [half // 3, half // 3, half - 2 * (half // 3)]
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    text |= {"rope_parameters": rope, "head_dim": width // 2}
    grid = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    sizes: dict[str, Any] = {"hidden_size": tower, "intermediate_size": 2 * tower, "out_hidden_size": width}
    if family == "qwen2_5_vl":
        more: dict[str, Any] = {"window_size": 16, "fullatt_block_indexes": [1]}
    else:
        more = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return AutoConfig.for_model(
        family,
        text_config=text,
        vision_config={**grid, **sizes, **more, "initializer_range": 0.3},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        **common,
    )


def vision_model(folder: Path, family: Family, seed: int = 0, *, size: int = 16, **sizes: Any) -> Path:
    """Save a model with random weights, its processor and its tokenizer; the folder, as a user has one."""
    torch.manual_seed(seed)
    made = AutoModelForImageTextToText.from_config(config(family, size=size, **sizes))
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)  # initialisers of some towers are too small to be seen
    made.save_pretrained(folder)
    words = tokenizer(family)
    words.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(_processor(family, size)))
    return folder


def _processor(family: Family, size: int) -> dict[str, Any]:
    """What processor_config.json says."""
    square = {"height": size, "width": size}
    if family == "llava":
        return {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": 4,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_processor": {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": size},
                "crop_size": square,
            },
        }
    if family == "llava-siglip":
        return {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": 4,
            "num_additional_image_tokens": 0,
            "vision_feature_select_strategy": "full",
            "image_processor": {"image_processor_type": "SiglipImageProcessor", "size": square},
        }
    if family in ("idefics3", "smolvlm"):
        name = "Idefics3" if family == "idefics3" else "SmolVLM"
        return {
            "processor_class": f"{name}Processor",
            "image_seq_len": (size // 4 // 2) ** 2,
            "image_processor": {
                "image_processor_type": f"{name}ImageProcessor",
                "size": {"longest_edge": 2 * size},
                "max_image_size": {"longest_edge": size},
                "do_image_splitting": True,
            },
        }
    name = "Qwen2_5_VL" if family == "qwen2_5_vl" else "Qwen3VL"
    return {
        "processor_class": f"{name}Processor",
        "image_processor": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 4,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 8 * 8, "longest_edge": 32 * 32},
        },
        "video_processor": {"video_processor_type": f"{'Qwen2' if '2' in name else 'Qwen3'}VLVideoProcessor"},
    }


def image(seed: int, width: int = 24, height: int = 16) -> ImageRef:
    """`picture` as the bytes of a PNG file, as a row has it."""
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, "PNG")
    return ImageRef.of(EncodedImage(buffer.getvalue()), f"row:{seed}")


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    """A drawn picture: a rectangle and an ellipse in random colours and places."""
    rng = random.Random(seed)

    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    made = Image.new("RGB", (width, height), colour())
    pen = ImageDraw.Draw(made)
    for shape in (pen.rectangle, pen.ellipse):
        left, top = rng.randrange(width // 2), rng.randrange(height // 2)
        shape((left, top, left + width // 3, top + height // 3), fill=colour())
    return made
