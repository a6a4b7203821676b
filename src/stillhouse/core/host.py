"""What the host knows about tensors on a device, so that nothing has to be asked of the device.

Reading a number from a GPU, or choosing entries by a mask, stops the program until all queued kernels have
run. All that decides shapes (lengths, sources, pairs, groups of an alignment) is known when a batch is made:
it stays on the host as numpy arrays, and goes to the device as positions where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
"""Numbers that the host knows, one for each row."""


def as_host(values: Tensor | NDArray[Any] | Sequence[Any]) -> NDArray[Any]:
    """An array on the host; a tensor on a GPU is waited for."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor on `device`, without waiting for it."""
    return carried([torch.from_numpy(np.ascontiguousarray(values))], device)[0]


def carried(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors of the host on `device`: to a GPU by one copy from pinned memory, for which nothing waits.

    A copy from ordinary memory would wait until all that is queued on the GPU has run.
    """
    device = torch.device(device)
    if device.type != "cuda" or any(tensor.device.type != "cpu" for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    staging = Staging.of(tensors)
    buffer = torch.empty(staging.size, dtype=torch.uint8, pin_memory=True)
    staging.fill(buffer, tensors)
    return staging.views(buffer.to(device, non_blocking=True))


def brought_back(tensor: Tensor) -> Tensor:
    """A copy on the host that a GPU fills when it gets there; what is queued on its stream later may read it.

    The host may read it only after it has waited for the GPU.
    """
    if tensor.device.type != "cuda":
        return tensor.detach().cpu().clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)


@dataclass(frozen=True, slots=True)
class Staging:
    """Where tensors lie in one block of bytes.

    Example: `Staging.of([ids, mask]).views(buffer)`
    """

    places: tuple[tuple[int, torch.dtype, torch.Size], ...]
    """Of each tensor: its first byte, a multiple of 16, its dtype and its shape."""
    size: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Staging:
        """For these, one after the other."""
        places, end = [], 0
        for tensor in tensors:
            places.append((end, tensor.dtype, tensor.shape))
            end += -(-tensor.numel() * tensor.element_size() // 16) * 16
        return cls(tuple(places), end)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors within a buffer of `size` bytes."""
        found = []
        for start, dtype, shape in self.places:
            part = buffer[start : start + shape.numel() * dtype.itemsize]
            found.append(part.view(dtype).view(shape))
        return found

    def fill(self, buffer: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write the tensors into the buffer."""
        for view, tensor in zip(self.views(buffer), tensors, strict=True):
            view.copy_(tensor)


def known(flag: Tensor) -> bool | None:
    """The truth of a tensor of one entry if it lies on the host; None on a device, which would have to be
    waited for."""
    return bool(flag.detach().numpy()) if flag.device.type == "cpu" else None


@dataclass(frozen=True, slots=True, eq=False)
class RowIndex:
    """Some rows, as positions that the host knows; consecutive rows are a slice, so that picking them copies
    nothing.

    Example: `RowIndex.of(np.flatnonzero(sources == code)).pick(hidden)`
    """

    host: Ints | slice
    _moved: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, positions: Ints) -> RowIndex:
        """From positions on the host."""
        count = len(positions)
        first = int(positions[0]) if count else 0
        consecutive = np.array_equal(positions, np.arange(first, first + count))
        return cls(slice(first, first + count) if consecutive else positions)

    def on(self, device: torch.device) -> Tensor | slice:
        """What picks the rows of a tensor on `device`; positions are copied there once."""
        if isinstance(self.host, slice):
            return self.host
        if device not in self._moved:
            self._moved[device] = to_device(self.host, device)
        return self._moved[device]

    def pick(self, values: Tensor) -> Tensor:
        """The rows of a tensor."""
        return values[self.on(values.device)]

    def __getitem__(self, part: slice) -> RowIndex:
        """Some of them, counted from the first."""
        if isinstance(self.host, slice):
            return RowIndex(slice(self.host.start + part.start, self.host.start + part.stop))
        return RowIndex(self.host[part], {device: moved[part] for device, moved in self._moved.items()})
