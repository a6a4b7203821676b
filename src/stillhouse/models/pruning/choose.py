"""Which layers, channels, heads and tokens stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.models.pruning.config import Prune
from stillhouse.models.pruning.importance import Importance
from stillhouse.models.pruning.layout import Layout
from stillhouse.models.pruning.sizes import FIELD, Sizes

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """What of a teacher its student starts with, by the teacher's numbers in ascending order.

    Example: `Kept(Sizes(2, 576, 1536, 9, 3, 49_152), layers=(0, 29))`
    """

    sizes: Sizes
    """Of the student."""
    layers: Numbers
    hidden_size: Numbers | None = None
    """None: all."""
    intermediate_size: tuple[Numbers, ...] | None = None
    """By kept layer."""
    num_attention_heads: tuple[Numbers, ...] | None = None
    """By kept layer; the heads of a group one after the other."""
    num_key_value_heads: tuple[Numbers, ...] | None = None
    """By kept layer."""
    vocabulary: Numbers | None = None

    def numbers(self, part: str, layer: int | None) -> Numbers | None:
        """What stays of a part; None: all of it.

        Args:
            part: as fields are called.
            layer: which of the kept layers.
        """
        found: Any = getattr(self, part)
        if found is None or part in ("hidden_size", "vocabulary"):
            return found
        assert layer is not None
        return found[layer]

    @property
    def narrows(self) -> bool:
        """Whether anything but layers goes."""
        parts = (self.hidden_size, self.intermediate_size, self.num_attention_heads, self.vocabulary)
        return any(part is not None for part in parts)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with anything that is kept."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file; `from_dict` reads it."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "sizes"}
        sizes = {name: getattr(self.sizes, name) for name in Sizes.__dataclass_fields__}
        return json.loads(json.dumps({"sizes": sizes, **parts}))

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What `as_dict` gave."""

        def numbers(value: Any) -> Any:
            return tuple(map(numbers, value)) if isinstance(value, list) else value

        parts = {name: numbers(value) for name, value in found.items() if name != "sizes"}
        return cls(Sizes(**found["sizes"]), **parts)


def choose(prune: Prune, layout: Layout, sizes: Sizes, importance: Importance | None) -> Kept:
    """What stays.

    Args:
        prune: says what is named, and how the rest is chosen.
        layout: of the teacher.
        sizes: of the student.
        importance: of the teacher's parts; None: evenly spaced.

    Raises:
        ModelError: the importance of what is to be cut cannot be measured in this family.
    """
    whole = layout.sizes
    layers = prune.given_layers or _best(
        whole.layers, sizes.layers, None if importance is None else importance.layers
    )

    def scores(part: str) -> Tensor | None:
        if importance is None:
            return None
        found: Tensor | None = getattr(importance, part)
        if found is None:
            raise ModelError(f"{FIELD}.{part}: its importance cannot be measured in {layout.family}.")
        return found[list(layers)]

    hidden = channels = heads = key_values = None
    if sizes.hidden_size != whole.hidden_size:
        found = scores("hidden_size")
        hidden = _best(whole.hidden_size, sizes.hidden_size, None if found is None else found.sum(0))
    if sizes.intermediate_size != whole.intermediate_size:
        found = scores("intermediate_size")
        channels = tuple(
            _best(whole.intermediate_size, sizes.intermediate_size, None if found is None else found[index])
            for index in range(len(layers))
        )
    if sizes.num_attention_heads != whole.num_attention_heads:
        found = scores("num_attention_heads")
        rows: list[Tensor] | list[None] = [None] * len(layers) if found is None else list(found)
        chosen = [_heads(whole, sizes, row) for row in rows]
        heads = tuple(one for one, _ in chosen)
        key_values = tuple(groups for _, groups in chosen)
    return Kept(sizes, tuple(layers), hidden, channels, heads, key_values)


def _heads(whole: Sizes, sizes: Sizes, scores: Tensor | None) -> tuple[Numbers, Numbers]:
    """The heads and the key-value heads of a layer that stay: groups by the sum of their heads' scores, then
    heads within each."""
    group = whole.group
    by_group = None if scores is None else scores.view(-1, group)
    groups = _best(
        whole.num_key_value_heads, sizes.num_key_value_heads, None if by_group is None else by_group.sum(1)
    )
    heads: list[int] = []
    for number in groups:
        within = _best(group, sizes.group, None if by_group is None else by_group[number])
        heads += [number * group + one for one in within]
    return tuple(heads), groups


def _best(count: int, kept: int, scores: Tensor | None) -> Numbers:
    """Those with the highest scores, the first of equal ones; without scores evenly spaced with both ends."""
    if scores is not None:
        order = torch.argsort(scores, descending=True, stable=True)
        return tuple(sorted(order[:kept].tolist()))
    return evenly(count, kept)


def evenly(count: int, kept: int) -> Numbers:
    """`kept` of `count` numbers from 0, evenly spaced from the first to the last; one alone is the first."""
    if kept == 1:
        return (0,)
    gaps, last = kept - 1, count - 1
    return tuple((2 * index * last + gaps) // (2 * gaps) for index in range(kept))


def facts(kept: Kept, layout: Layout, prune: Prune, importance: Importance | None) -> dict[str, Any]:
    """What a run's folder and page keep of the choice."""
    sizes: dict[str, Sequence[int]] = {
        name: (getattr(kept.sizes, name), getattr(layout.sizes, name)) for name in Sizes.__dataclass_fields__
    }
    found: dict[str, Any] = {
        "choose": prune.choose if prune.chooses else "given",
        "sizes": sizes,
        "digest": kept.digest,
        "kept": kept.as_dict(),
    }
    if importance is not None:
        found |= {
            "rows": importance.rows,
            "tokens": importance.tokens,
            "block_influence": [round(value, 6) for value in importance.layers.tolist()],
        }
    return found
