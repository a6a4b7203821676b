"""A KV cache of fixed shape: each row writes at a slot of its own, which only the device knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from stillhouse.engines.kv_cache import PreallocatedCache, PreallocatedLayer


class SlotLayer(DynamicLayer):
    """The keys and values [B, H, capacity, D] of one layer.

    `update` writes the one token of each row at the row's slot and returns all slots; which of them hold a
    token is the business of the attention mask. Nothing is allocated, and no shape depends on data.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Buffers [B, H, capacity, D] and the slot [B] at which each row writes."""
        super().__init__()
        self.keys, self.values, self.slots = keys, values, slots
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values [B, H, 1, D] of one token a row; returns those of all slots."""
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            assert buffer is not None
            index = self.slots[:, None, None, None].expand_as(states)
            buffer.scatter_(2, index, states.to(buffer.dtype))
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Zero: how many slots are filled differs between rows and is not known to the host."""
        return 0


class SlotCache(Cache):
    """A `SlotLayer` for every layer of a model, all of the same slots [B]."""

    def __init__(self, layers: list[SlotLayer], slots: Tensor) -> None:
        super().__init__(layers=layers)
        self.slots = slots

    @classmethod
    def like(cls, example: PreallocatedCache, rows: int, capacity: int, slots: Tensor) -> SlotCache:
        """Empty, for as many rows and slots, of the layers, heads and dtype of a filled cache."""

        def empty(states: Tensor) -> Tensor:
            # Zeros, because masked slots still have to be finite.
            return states.new_zeros(rows, states.shape[1], capacity, states.shape[3])

        layers = [
            SlotLayer(empty(layer.key_buffer), empty(layer.value_buffer), slots) for layer in _filled(example)
        ]
        return cls(layers, slots)

    def view(self, rows: int, capacity: int) -> SlotCache:
        """The first rows and slots, in the same storage."""
        slots = self.slots[:rows]
        parts = [(keys[:rows, :, :capacity], values[:rows, :, :capacity]) for keys, values in self.buffers()]
        return SlotCache([SlotLayer(keys, values, slots) for keys, values in parts], slots)

    def buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, both [B, H, capacity, D]."""
        return [(layer.keys, layer.values) for layer in self.layers]

    def write_rows(self, rows: Tensor, filled: PreallocatedCache, columns: Tensor) -> None:
        """Overwrite the first slots of some rows.

        Args:
            rows: [b] which rows.
            filled: the keys and values of b rows.
            columns: [b, L] the column of `filled` that slot 0, 1, ... takes; any where a slot stays unused.
        """
        for (keys, values), layer in zip(self.buffers(), _filled(filled), strict=True):
            for buffer, states in ((keys, layer.key_buffer), (values, layer.value_buffer)):
                index = columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                buffer[rows, :, : columns.shape[1]] = states.gather(2, index)

    def move_rows(self, rows: Tensor) -> None:
        """Move these rows to the front, in place."""
        for pair in self.buffers():
            for buffer in pair:
                buffer[: len(rows)] = buffer[rows]


def _filled(cache: PreallocatedCache) -> list[PreallocatedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]


SlotMask = Tensor | dict[str, Tensor]
"""What a model takes as the mask [B, 1, 1, capacity] of its layers, or of each kind of layers."""


class SlotMasks:
    """Which slots a row attends to: those up to its own, within the layer's window where it has one.

    Masks are added to the scores, in the dtype of keys: from one of truth values every layer would make its
    own. Models with several kinds of layers take one for each kind.
    """

    def __init__(self, config: Any) -> None:
        """For a model of this configuration."""
        text = config.get_text_config(decoder=True)
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        types = getattr(text, "layer_types", None)
        self.one_for_all = len(set(windows)) <= 1
        self.windows = dict(zip(types or windows, windows, strict=False))
        """The window of each kind of layer; None: it attends to all slots before its own."""

    @classmethod
    def of(cls, model: nn.Module) -> Callable[[SlotCache], Any]:
        """Those of a model, which may have a way of its own (`slot_masks`)."""
        own: Callable[[SlotCache], Any] | None = getattr(model, "slot_masks", None)
        return cls(model.config) if own is None else own

    def __call__(self, cache: SlotCache) -> SlotMask:
        """The mask [B, 1, 1, capacity] for what is written next, or one for each kind of layer."""
        masks = {kind: _mask(cache, window) for kind, window in self.windows.items()}
        return next(iter(masks.values())) if self.one_for_all else masks


def _mask(cache: SlotCache, window: int | None) -> Tensor:
    keys, _ = cache.buffers()[0]
    slot, own = torch.arange(keys.shape[2], device=keys.device), cache.slots[:, None]
    hidden = slot > own
    if window is not None:
        hidden = hidden | (slot <= own - window)
    mask = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
    return mask.masked_fill_(hidden, torch.finfo(keys.dtype).min)[:, None, None, :]
