"""A dispatch mode under which nothing may ask a device for a number or for a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ = ("_local_scalar_dense", "item", "equal", "is_nonzero")
SHAPED_BY_DATA = ("nonzero", "masked_select", "unique", "bincount", "histc")


class HostSync(AssertionError):
    """An operation that would stop the program until a GPU has run all that is queued."""


class NoHostSync(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for.

    Example:
        >>> with NoHostSync():
        ...     loss, values = fused_rows(objective, hidden, head, teacher, teacher_head, weight, rows)
        ...     loss.backward()
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READ or any(name.startswith(("_" + word, word)) for word in SHAPED_BY_DATA):
            raise HostSync(f"{func} waits for the device")
        if name.startswith(("index", "_index_put")) and any(map(is_mask, tree_leaves(args[1:2]))):
            raise HostSync(f"{func} with a mask has a shape that only the device knows")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostSync(f"{func} without output_size has a shape that only the device knows")
        return func(*args, **kwargs)


def is_mask(value: object) -> bool:
    """Whether an index is a mask, of which a device would have to count the true entries."""
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)
