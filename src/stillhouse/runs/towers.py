"""How much of a run is images: their tokens in prompts, and what vision towers take for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.core.types import Prompt
from stillhouse.models import ImageReader
from stillhouse.models.parts import parts_of


@dataclass(frozen=True, slots=True)
class TowerSize:
    """What a vision tower takes for one sequence.

    Example: `TowerSize(layers=24, hidden_size=1024, patches=577, trained=False, more_tokens=0)`
    """

    layers: int
    hidden_size: int
    patches: int
    """Of the images of the sequence that has most."""
    trained: bool
    """Whether gradients go through it."""
    more_tokens: int = 0
    """How many more tokens than the student's the longest prompt of this model has."""

    def activations(self, sequences: float) -> float:
        """Numbers that a step keeps for so many sequences: 28 of the hidden size for each patch and layer
        that a gradient goes through, else those of two layers at a time."""
        return sequences * self.patches * self.hidden_size * 28 * (self.layers if self.trained else 2)


def tower_size(model: Any, reader: ImageReader | None, prompts: Sequence[Prompt]) -> TowerSize | None:
    """The tower of a model without weights; None where it reads text alone or no prompt has images.

    Args:
        model: of transformers, with what is trained of it set.
        reader: what reads images for it.
        prompts: of the training.
    """
    shown = [prompt.images for prompt in prompts if prompt.images]
    if reader is None or not shown:
        return None
    vision = model.config.vision_config
    merged = getattr(vision, "spatial_merge_size", None) or getattr(model.config, "scale_factor", None) or 1
    tokens = max(sum(map(reader.num_tokens, images)) for images in shown)
    weights = dict(model.named_parameters())
    parts = parts_of(model)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    own = max(len(prompt.teacher_ids or prompt.token_ids) for prompt in prompts)
    return TowerSize(
        layers=getattr(vision, "num_hidden_layers", None) or vision.depth,
        hidden_size=vision.hidden_size,
        patches=tokens * int(merged) ** 2,
        trained=any(weights[name].requires_grad for name, part in parts.items() if part == "tower"),
        more_tokens=max(0, own - longest),
    )


def image_rows(prompts: Sequence[Prompt], reader: ImageReader | None) -> dict[str, int]:
    """What `check` says of the images of the training; nothing where there are none."""
    shown = [prompt.images for prompt in prompts if prompt.images]
    if reader is None or not shown:
        return {}
    counts = [sum(map(reader.num_tokens, images)) for images in shown]
    return {
        "images": sum(map(len, shown)),
        "rows with images": len(shown),
        "image tokens": sum(counts),
        "image tokens of a row, at most": max(counts),
    }
