"""What a model is called with for the images of prompts, in the first pass over the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.host import carried
from stillhouse.core.images import ImageRef
from stillhouse.models.hidden import image_reader, unwrap
from stillhouse.models.vision import image_arguments

OF_TOKENS = ("position_ids", "mm_token_type_ids", "token_type_ids")
"""Arguments with a number for each token, which padding moves."""


def image_token(model: nn.Module) -> int | None:
    """The id of the tokens in whose place a model puts what it sees of images; None: it reads text alone.

    A model never writes it: no image would belong to it.
    """
    parts = getattr(model, "models", [model])
    readers = [reader for part in parts if (reader := image_reader(part)) is not None]
    return readers[0].image_id if readers else None


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """Of a batch of prompts that are padded on the left."""

    arguments: dict[str, Any]
    """Keyword arguments of the forward pass, on the model's device."""
    next_positions: list[int]
    """Of each prompt, the position of the token that follows it: where positions have several parts (M-RoPE),
    one more than the largest of them, otherwise the number of its tokens."""


def image_inputs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    images: Sequence[tuple[ImageRef, ...]],
    width: int,
) -> ImageInputs:
    """The images of prompts for a model, which may have a way of its own (`image_inputs`).

    Args:
        model: reads the images through its own processor.
        prompts: with the image tokens of this model.
        images: those of each prompt; some have none.
        width: to which the prompts are padded on the left.

    Raises:
        ModelError: the model reads no images, or a prompt has other tokens than its images take.
    """
    own = getattr(model, "image_inputs", None)
    if own is not None:
        found: ImageInputs = own(prompts, images, width)
        return found
    arguments = image_arguments(unwrap(model), prompts, images, width)
    lengths = list(map(len, prompts))
    following = lengths
    if "position_ids" in arguments:
        places = enumerate(lengths)
        following = [int(arguments["position_ids"][..., row, :end].max()) + 1 for row, end in places]
    for name in OF_TOKENS:
        if name in arguments:
            arguments[name] = _padded_on_the_left(arguments[name], lengths)
    device = next(model.parameters()).device
    tensors = carried(list(arguments.values()), device)
    return ImageInputs(dict(zip(arguments, tensors, strict=True)), following)


def _padded_on_the_left(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """[..., B, T] with the first `lengths` of each row at its end, and what was behind them before it."""
    width = values.shape[-1]
    rows = [values[..., row, :].roll(width - length, -1) for row, length in enumerate(lengths)]
    return torch.stack(rows, -2)
