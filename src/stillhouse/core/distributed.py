"""Collective operations: all ranks wait, or the first one computes and all of them get the result."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from stillhouse.errors import DataError, EnvironmentFault, StillhouseError

T = TypeVar("T")


def barrier(world_size: int) -> None:
    """Wait until all ranks have come here."""
    if world_size > 1:
        _group().barrier()


def broadcast_from_first(rank: int, world_size: int, compute: Callable[[], T]) -> T:
    """Run `compute` on rank 0 alone and return its result on all ranks.

    Raises:
        StillhouseError: `compute` raised it; on the other ranks a DataError with the same message, so that
            none of them waits for ever.
    """
    if world_size == 1:
        return compute()
    dist = _group()
    result: list[Any] = [None, None]  # the value, or the message of an error
    failure: StillhouseError | None = None
    if rank == 0:
        try:
            result[0] = compute()
        except StillhouseError as error:
            failure, result[1] = error, str(error)
    dist.broadcast_object_list(result, src=0)
    if failure is not None:
        raise failure
    if result[1] is not None:
        raise DataError(result[1])
    value: T = result[0]
    return value


def _group() -> Any:
    """torch.distributed with a process group: the one of the training, or a new one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise EnvironmentFault(
                "WORLD_SIZE is more than 1, but MASTER_ADDR, where the processes meet, is not set. "
                "Start them with torchrun."
            )
        dist.init_process_group("gloo")
    return dist
