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
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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
