"""A preallocated KV cache that is written in place and whose rows can be dropped and overwritten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class PreallocatedLayer(DynamicLayer):
    """The keys and values [B, H, capacity, D] of one layer; the first `length` columns are filled.

    A drop-in for transformers' `DynamicLayer`: a decoding step writes one column instead of copying all.
    """

    def __init__(self, capacity: int, rows: int | None = None, length: int = 0) -> None:
        """Room for `capacity` columns.

        Args:
            capacity: columns.
            rows: number of rows; by default that of the first `update`.
            length: columns that count as filled at the start, for rows that `write_rows` fills later.
        """
        super().__init__()
        self.capacity = capacity
        self.rows = rows
        self.length = length
        self.is_initialized = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns [B, H, t, D]; returns all keys and values so far, [B, H, length, D]."""
        self._allocate(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.key_buffer[:, :, start : self.length] = key_states
        self.value_buffer[:, :, start : self.length] = value_states
        self.keys = self.key_buffer[:, :, : self.length]
        self.values = self.value_buffer[:, :, : self.length]
        return self.keys, self.values

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.is_initialized:
            return

        def buffer_for(states: Tensor) -> Tensor:
            # Zeros, because masked positions still have to be finite.
            rows, heads, _, size = states.shape
            return states.new_zeros(self.rows or rows, heads, self.capacity, size)

        self.key_buffer, self.value_buffer = buffer_for(key_states), buffer_for(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Number of filled columns."""
        return self.length

    def select_rows(self, rows: Tensor, start: int) -> None:
        """Keep only these rows, without their first `start` columns."""
        length = self.length - start
        for name in ("key_buffer", "value_buffer"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            torch.index_select(old[:, :, start : self.length], 0, rows, out=new[:, :, :length])
            setattr(self, name, new)
        self.length = length

    def write_rows(self, rows: Tensor, other: PreallocatedLayer) -> None:
        """Overwrite these rows with the rows of `other`, right-aligned: both end at the same column."""
        self._allocate(other.key_buffer, other.value_buffer)
        start = self.length - other.length
        self.key_buffer[rows, :, start : self.length] = other.key_buffer[:, :, : other.length]
        self.value_buffer[rows, :, start : self.length] = other.value_buffer[:, :, : other.length]


class PreallocatedCache(Cache):
    """A `PreallocatedLayer` for every layer of a model."""

    def __init__(self, num_layers: int, capacity: int, rows: int | None = None, length: int = 0) -> None:
        """See `PreallocatedLayer`."""
        super().__init__(layers=[PreallocatedLayer(capacity, rows, length) for _ in range(num_layers)])

    def select_rows(self, rows: Tensor, start: int) -> None:
        """Keep only these rows, without their first `start` columns."""
        for layer in self.layers:
            layer.select_rows(rows, start)

    def write_rows(self, rows: Tensor, other: PreallocatedCache) -> None:
        """Overwrite these rows with the rows of `other`."""
        for layer, other_layer in zip(self.layers, other.layers, strict=True):
            layer.write_rows(rows, other_layer)


def num_attention_layers(config: Any) -> int | None:
    """The number of layers if all are full or sliding-window attention; None for any other architecture.

    Recurrent, hybrid, chunked and shared-cache architectures keep state that this cache does not hold.
    """
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"]
    if not set(types) <= {"full_attention", "sliding_attention"}:
        return None
    layers = DynamicCache(config=config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return len(layers) if plain else None
