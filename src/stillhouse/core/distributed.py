"""What several processes decide together: one of them does it, all of them know."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from stillhouse.errors import DataError, EnvironmentFault, StillhouseError

T = TypeVar("T")


def wait(ranks: int) -> None:
    """Go on when all processes have come here."""
    if ranks > 1:
        _group().barrier()


def from_first(rank: int, ranks: int, make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in all of them.

    Raises:
        StillhouseError: `make` raised it; in the other processes as a DataError with the same words, so that
            none of them waits for ever.
    """
    if ranks == 1:
        return make()
    dist = _group()
    told: list[Any] = [None, None]
    failure: StillhouseError | None = None
    if rank == 0:
        try:
            told[0] = make()
        except StillhouseError as error:
            failure, told[1] = error, str(error)
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise DataError(told[1])
    value: T = told[0]
    return value


def _group() -> Any:
    """torch.distributed with a group of processes: the training's, or one that is made now."""
    import torch.distributed as dist

    if not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise EnvironmentFault(
                "WORLD_SIZE says that several processes work together, but nothing where they meet. "
                "Start them with torchrun."
            )
        dist.init_process_group("gloo")
    return dist
