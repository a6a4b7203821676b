"""The sizes of a language model, and its configuration with others."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.errors import ModelError

FIELD = "student.from_teacher"
MLP_SIZES = ("intermediate_size", "n_inner", "ffn_dim")
"""How families call the width of their MLP."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Depth, width and vocabulary of a language model.

    Example: `Sizes(30, 576, 1536, 9, 3, 49_152)  # SmolLM2-135M`
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocabulary: int

    @property
    def group(self) -> int:
        """Query heads that read one key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def describe(self) -> str:
        """In words."""
        return (
            f"{self.layers} layers, hidden size {self.hidden_size}, MLP {self.intermediate_size}, "
            f"{self.num_attention_heads} heads ({self.num_key_value_heads} key-value), "
            f"{self.vocabulary:,} tokens"
        )


def text_config(config: Any) -> Any:
    """The configuration of the language model, which may be nested in that of a larger model."""
    return config.get_text_config(decoder=True)


def sizes_of(config: Any) -> Sizes:
    """The sizes that a transformers configuration has."""
    text = text_config(config)
    heads = text.num_attention_heads
    mlp = next((size for name in MLP_SIZES if isinstance(size := getattr(text, name, None), int)), None)
    return Sizes(
        text.num_hidden_layers,
        text.hidden_size,
        4 * text.hidden_size if mlp is None else mlp,
        heads,
        getattr(text, "num_key_value_heads", None) or heads,
        text.vocab_size,
    )


def head_size(config: Any) -> int:
    """Numbers in the query of one head and token."""
    text = text_config(config)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def pruned_config(original: Any, layers: Sequence[int], sizes: Sizes | None = None) -> Any:
    """The transformers configuration for a subset of the layers and other widths.

    Lists with one entry a layer are cut too; the size of a head stays.

    Args:
        original: of the teacher.
        layers: the layers to keep.
        sizes: of the result; None: as the teacher's but for the layers.

    Raises:
        ModelError: there is no such layer, the layers break the architecture's pattern of layer types, or
            the family takes no model of such sizes.
    """
    depth = text_config(original).num_hidden_layers
    if layers[-1] >= depth:
        raise ModelError(
            f"{FIELD}.layers: layer {layers[-1]} does not exist; the teacher has {depth} (0 to {depth - 1})."
        )
    config = copy.deepcopy(original)
    text = text_config(config)
    text.num_hidden_layers = len(layers)
    for name, value in text_config(original).to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            setattr(text, name, [value[index] for index in layers])
    types = getattr(text_config(original), "layer_types", None)
    if types and list(text.layer_types) != [types[index] for index in layers]:
        raise ModelError(
            f"{FIELD}.layers: {text.model_type} repeats {', '.join(dict.fromkeys(types))} "
            f"in a fixed pattern, and layers {list(layers)} do not follow it. Choose layers whose types do."
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # GGUF weights are dequantised, and saving would fail with it
    if sizes is not None:
        before = sizes_of(original)
        _set_widths(text, before, sizes, head_size(original))
        tower: Any = getattr(config, "vision_config", None)
        if getattr(tower, "out_hidden_size", None) == before.hidden_size:  # what Qwen-VL's projector writes
            tower.out_hidden_size = sizes.hidden_size
        _check_loads(config)
    return config


def _set_widths(text: Any, before: Sizes, after: Sizes, head: int) -> None:
    if after.vocabulary != before.vocabulary:
        text.vocab_size = after.vocabulary
    if after.intermediate_size != before.intermediate_size or after.hidden_size != before.hidden_size:
        name = next((one for one in MLP_SIZES if hasattr(text, one)), None)
        if name is not None:  # written out, because the default of some families follows the hidden size
            setattr(text, name, after.intermediate_size)
    if (after.hidden_size, after.num_attention_heads) != (before.hidden_size, before.num_attention_heads):
        if getattr(text, "word_embed_proj_dim", None) == before.hidden_size:  # OPT's embeddings
            text.word_embed_proj_dim = after.hidden_size
        text.hidden_size = after.hidden_size
        text.num_attention_heads = after.num_attention_heads
        if after.hidden_size != head * after.num_attention_heads or hasattr(text, "head_dim"):
            text.head_dim = head
    if hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = after.num_key_value_heads


def _check_loads(config: Any) -> None:
    """Refuse sizes with which the family's own configuration could not be read again."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict(config.to_dict())
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = re.sub(r"\s+", " ", str(error.__cause__ or error))
        raise ModelError(f"{FIELD}: {config.model_type} takes no such sizes: {reason}") from error
