"""Which axis of which weight is a layer's MLP, its heads, the residual stream or the vocabulary.

Projections of attention and MLP are known by the names that families give them; the residual stream is found
by asking for the same architecture with another hidden size and looking which axes follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from stillhouse.errors import ModelError
from stillhouse.models.pruning.sizes import FIELD, Sizes, head_size, pruned_config, sizes_of, text_config

Part = Literal["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocabulary"]
Axis = tuple[Part, ...]
"""What lies one behind the other along an axis of a weight; empty: the axis never changes."""

HIDDEN: Axis = ("hidden_size",)
HEADS: Part = "num_attention_heads"
KEY_VALUES: Part = "num_key_value_heads"
CHANNELS: Part = "intermediate_size"
INTO: dict[str, dict[str, Axis]] = {
    "attention": {
        "q_proj": (HEADS,),
        "k_proj": (KEY_VALUES,),
        "v_proj": (KEY_VALUES,),
        "qkv_proj": (HEADS, KEY_VALUES, KEY_VALUES),
        "c_attn": (HEADS, HEADS, HEADS),
        "query_key_value": (HEADS,),
    },
    "mlp": {
        **dict.fromkeys(("gate_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h"), (CHANNELS,)),
        "gate_up_proj": (CHANNELS, CHANNELS),
    },
}
"""Projections out of the residual stream, and what their results are."""
BACK: dict[str, dict[str, Axis]] = {
    "attention": dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj"), (HEADS,)),
    "mlp": dict.fromkeys(("down_proj", "fc2", "c_proj", "dense_4h_to_h"), (CHANNELS,)),
}
"""Projections back into it, and what they read."""
EXPERTS = "expert"
"""In the names of modules whose channels belong to one of several MLPs."""


@dataclass(frozen=True)
class Layout:
    """Where the sizes of an architecture stand in its weights.

    Example: `layout.axes["model.layers.0.mlp.up_proj.weight"]  # (("intermediate_size",), ("hidden_size",))`
    """

    family: str
    """The name of the model's class."""
    sizes: Sizes
    head: int
    """Numbers in the query of one head."""
    layers: str
    """What the names of a layer's weights begin with, up to its number."""
    axes: Mapping[str, tuple[Axis, ...]]
    """By the name of the weight."""
    shapes: Mapping[str, tuple[int, ...]]
    into: Mapping[str, str]
    """"attention", "mlp" -> a module of a layer that reads its normalised input."""
    back: Mapping[str, str]
    """"attention", "mlp" -> the module of a layer that writes to the residual stream."""
    tied_heads: bool
    """Whether the heads together are as wide as the residual stream, as in GPT-2."""

    def unit(self, name: str, axis: int, part: Part) -> int:
        """How many numbers along an axis of a weight belong to one channel, head or token."""
        parts, size = self.axes[name][axis], self.shapes[name][axis]
        if len(set(parts)) > 1:  # queries beside keys and values
            return self.head
        return max(1, size // len(parts) // max(1, int(getattr(self.sizes, part))))

    def parameters(self, sizes: Sizes, names: frozenset[str]) -> int:
        """How many parameters a model of these sizes has.

        Args:
            sizes: of that model.
            names: the weights that count; tied ones once.
        """
        total = 0
        for name in names:
            number = self.layer_of(name)
            if number is not None and number >= sizes.layers:
                continue
            count = 1
            for axis, parts in enumerate(self.axes[name]):
                whole = sum(getattr(sizes, part) * self.unit(name, axis, part) for part in parts)
                count *= whole if parts else self.shapes[name][axis]
            total += count
        return total

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a weight belongs to."""
        if not name.startswith(self.layers):
            return None
        return int(name.removeprefix(self.layers).partition(".")[0])


def layout_of(model: nn.Module) -> Layout:
    """The layout of a causal language model, which may have no weights (on the device meta).

    Raises:
        ModelError: its layers cannot be found.
    """
    config: Any = model.config
    sizes, head = sizes_of(config), head_size(config)
    layers = layers_of(model)
    shapes = _shapes(model)
    tied_heads = sizes.num_attention_heads * head == sizes.hidden_size and not _own_head_size(model)
    follows = _following_hidden(model, sizes, head, tied_heads)
    axes: dict[str, tuple[Axis, ...]] = {
        name: tuple(HIDDEN if changes else () for changes in follows.get(name, (False,) * len(shape)))
        for name, shape in shapes.items()
    }
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        for name, module in model.named_modules():
            if module is embedding and embedding is not None:
                axes[f"{name}.weight"] = (("vocabulary",), axes[f"{name}.weight"][1])
                if f"{name}.bias" in axes:
                    axes[f"{name}.bias"] = (("vocabulary",),)
    into: dict[str, str] = {}
    back: dict[str, str] = {}
    for name, module in model.named_modules():
        found = _projection(name, layers)
        if found is None or getattr(module, "weight", None) is None:
            continue
        block, relative, outwards, parts = found
        (into if outwards else back).setdefault(block, relative)
        sides = (parts, HIDDEN) if outwards else (HIDDEN, parts)
        if type(module).__name__ == "Conv1D":  # stores [in, out]
            axes[f"{name}.weight"] = sides[::-1]
        else:
            axes[f"{name}.weight"] = sides
        if f"{name}.bias" in axes:
            axes[f"{name}.bias"] = sides[:1]
    return Layout(type(model).__name__, sizes, head, layers, axes, shapes, into, back, tied_heads)


def layers_of(model: nn.Module) -> str:
    """What the names of the layers' weights begin with, such as `model.layers.`.

    Of a model that also sees, the language model's: the list in which a layer projects from its hidden size.

    Raises:
        ModelError: there is no list of so many layers.
    """
    text = text_config(model.config)
    depth = text.num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    for name, _ in found:
        if not any(word in name for word in ("vision", "visual", "audio", "encoder")):
            return f"{name}."
    if not found:
        raise ModelError(f"{FIELD}: cannot find the {depth} layers of {type(model).__name__}.")
    return f"{found[0][0]}."


def _projection(name: str, layers: str) -> tuple[str, str, bool, Axis] | None:
    """Of a module: attention or mlp, its name within the layer, whether it leads out of the residual stream,
    and what the other side is; None for any other module."""
    if not name.startswith(layers) or EXPERTS in name:
        return None
    _, _, relative = name.removeprefix(layers).partition(".")
    parent, _, last = relative.rpartition(".")
    block = "attention" if "attn" in parent or "attention" in parent else "mlp"
    for outwards, table in ((True, INTO), (False, BACK)):
        if last in table[block]:
            return block, relative, outwards, table[block][last]
    return None


def _own_head_size(model: nn.Module) -> bool:
    """Whether the architecture takes heads that are not as wide as the residual stream together."""
    sizes = sizes_of(model.config)
    if sizes.num_attention_heads == 1:
        return True
    fewer = replace(sizes, num_attention_heads=1, num_key_value_heads=1)
    with contextlib.suppress(ModelError, ValueError, RuntimeError, TypeError):
        return _shapes(_like(model, fewer)) != _shapes(model)
    return False


def _following_hidden(
    model: nn.Module, sizes: Sizes, head: int, tied_heads: bool
) -> dict[str, tuple[bool, ...]]:
    """By weight: which of its axes are as long as the residual stream is wide."""
    wider = replace(sizes, hidden_size=2 * sizes.hidden_size)
    if tied_heads:
        factor = wider.hidden_size // head // sizes.num_attention_heads
        wider = replace(
            wider,
            num_attention_heads=sizes.num_attention_heads * factor,
            num_key_value_heads=sizes.num_key_value_heads * factor,
        )
    before, after = _shapes(model), {}
    with contextlib.suppress(ModelError, ValueError, RuntimeError, TypeError):
        after = _shapes(_like(model, wider))
    return {
        name: tuple(old != new for old, new in zip(before[name], shape, strict=True))
        for name, shape in after.items()
        if name in before and len(shape) == len(before[name])
    }


def _like(model: nn.Module, sizes: Sizes) -> nn.Module:
    """The same architecture in other sizes, without weights."""
    layers = range(text_config(model.config).num_hidden_layers)
    return without_weights(model, pruned_config(model.config, list(layers), sizes))


def without_weights(model: nn.Module, config: Any) -> nn.Module:
    """A model of the same class from another configuration, on the device meta."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _quiet():
        made: nn.Module = type(model)(config)
    made.tie_weights()  # type: ignore[operator]  # init_empty_weights has untied them
    return made


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about special tokens of configurations that nobody will use."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
