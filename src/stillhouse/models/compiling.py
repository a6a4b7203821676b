"""`torch.compile` of the layers of a model, in place: weights keep their names, copies and hooks work."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from stillhouse.errors import ModelError
from stillhouse.models.hidden import decoder_of, unwrap

CACHES = ("past_key_values", "layer_past")
"""What architectures call the argument of a layer with keys and values of earlier tokens."""


def compile_layers(model: nn.Module) -> nn.Module:
    """Run each layer of a causal language model through `torch.compile`, but for decoding with a cache, whose
    shapes change with each token.

    Layers of one class share their compiled code, which is made for shapes that vary. The first passes, with
    and without gradients, take as long as the compiler needs.

    Raises:
        ModelError: its list of layers cannot be found.
    """
    for layer in layers_of(unwrap(model)):
        layer.forward = MethodType(_compiled(type(layer).forward), layer)
    return model


def layers_of(inner: nn.Module) -> nn.ModuleList:
    """The layers of a transformers model.

    Raises:
        ModelError: there is no list of as many modules as its configuration has layers.
    """
    config: Any = inner.config
    depth = config.get_text_config().num_hidden_layers
    for module in decoder_of(inner).modules():  # the tower of a vision-language model may be as deep
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(
        f"train.compile_models: cannot find the {depth} layers of {type(inner).__name__}. Leave it out."
    )


@lru_cache(maxsize=32)
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a class of layers: compiled, and as it is where keys and values are kept."""
    compiled = torch.compile(forward, dynamic=True)
    names = list(inspect.signature(forward).parameters)
    cache = next((name for name in CACHES if name in names), None)
    if cache is None:
        return compiled
    place = names.index(cache)

    def either(*args: Any, **options: Any) -> Any:
        kept = args[place] if len(args) > place else options.get(cache)
        return forward(*args, **options) if kept is not None else compiled(*args, **options)

    return either
