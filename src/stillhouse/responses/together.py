"""What several processes decide together: one of them does it, all of them know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from stillhouse.errors import DataError, StillhouseError

T = TypeVar("T")


def wait(ranks: int) -> None:
    """Go on when all processes have come here."""
    if ranks > 1:
        import torch.distributed as dist

        dist.barrier()


def from_first(rank: int, ranks: int, make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in all of them.

    Raises:
        StillhouseError: `make` raised it; in the other processes as a DataError with the same words, so that
            none of them waits for ever.
    """
    if ranks == 1:
        return make()
    import torch.distributed as dist

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
