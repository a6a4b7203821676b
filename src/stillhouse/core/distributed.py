"""The processes of a run: who they are, and what they do together.

In a collective operation all of them wait for one another, or the first one computes and all get the result.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from stillhouse.errors import DataError, EnvironmentFault, StillhouseError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

YES = frozenset({"1", "true", "yes", "y", "on", "t"})
"""What accelerate's launcher says in a variable that switches something on."""
GROUPS = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
"""Of accelerate's ParallelismConfig; their product is the number of processes."""


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are, as the launcher says."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def group_sizes() -> dict[str, int] | None:
    """The sizes of accelerate's `parallelism_config`, as its launcher says; None where that gives none.

    Raises:
        EnvironmentFault: one is no number.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() not in YES:
        return None
    sizes = {}
    for name in GROUPS:
        given = os.environ.get(variable := f"PARALLELISM_CONFIG_{name.upper()}") or "1"
        if not given.isdecimal() or int(given) < 1:
            raise EnvironmentFault(f"{variable} is {given!r}, and has to be a number of processes.")
        sizes[name] = int(given)
    return sizes


def processes_here() -> int:
    """How many of them the launcher has started on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


class World(Protocol):
    """The processes that train together, as far as a step and its responses need to know."""

    rank: int
    size: int

    def local_indices(self, count: int) -> Sequence[int]:
        """The indices of this process's `count` prompts among all prompts of the step."""
        ...

    def add(self, counts: Tensor) -> Tensor:
        """All-reduce by sum."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        ...


class SingleProcess:
    """A world of one."""

    rank, size = 0, 1

    def local_indices(self, count: int) -> Sequence[int]:
        """All indices."""
        return range(count)

    def add(self, counts: Tensor) -> Tensor:
        """The counts themselves."""
        return counts

    def gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]


SINGLE_PROCESS: World = SingleProcess()


class Ranks:
    """The processes of a distributed run.

    A step's prompts are dealt out in micro-batches: with two processes and micro-batches of 2, the first has
    indices 0, 1, 4, 5, ... and the second 2, 3, 6, 7, ..., so that any number of processes trains on the same
    prompts at each step.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device | None = None, micro_batch_size: int = 1
    ) -> None:
        """As the launcher says.

        Args:
            rank: of this process.
            size: how many there are.
            device: where the process group adds numbers; default: the CPU.
            micro_batch_size: prompts that a process takes at a time.
        """
        self.rank = rank
        self.size = size
        self._device = device
        self._micro_batch_size = micro_batch_size

    @classmethod
    def of(cls, arguments: Any) -> Ranks:
        """Those of TrainingArguments."""
        size = arguments.per_device_train_batch_size
        return cls(arguments.process_index, arguments.world_size, arguments.device, size)

    def local_indices(self, count: int) -> Sequence[int]:
        """Micro-batch after micro-batch of the step, every `size`-th of them."""
        size = self._micro_batch_size
        rounds = (divmod(number, size) for number in range(count))
        return [(batch * self.size + self.rank) * size + place for batch, place in rounds]

    def add(self, counts: Tensor) -> Tensor:
        """All-reduce by sum."""
        if self.size == 1:
            return counts
        moved = counts.to(self._device)
        _group().all_reduce(moved)
        return moved.cpu()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank; it is pickled on its way."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            _group().all_gather_object(found, value)
        return found


def is_sharded(model: Any) -> bool:
    """Whether the weights of a model are spread over the processes (FSDP2, ZeRO-3), so that all of them have
    to run the same forward passes."""
    return any(hasattr(one, "full_tensor") or hasattr(one, "ds_id") for one in model.parameters())


def barrier(world_size: int, patient: bool = False) -> None:
    """Wait until all ranks have come here.

    Args:
        world_size: how many there are.
        patient: wait without the time limit of the process group, for one that works alone meanwhile.
    """
    if world_size > 1:
        _group().barrier(group=_patient_group() if patient else None)


def first_alone(compute: Callable[[], T]) -> T:
    """Run `compute` on rank 0 as if there were no other process, while these wait for it, however long.

    Returns:
        What it returned, on all ranks.

    Raises:
        StillhouseError: as `broadcast_from_first`.
    """

    def alone() -> T:
        with _as_only_process():
            return compute()

    return broadcast_from_first(*rank_and_size(), alone, patient=True)


def broadcast_from_first(rank: int, world_size: int, compute: Callable[[], T], patient: bool = False) -> T:
    """Run `compute` on rank 0 alone and return its result on all ranks.

    Args:
        rank: of this process.
        world_size: how many there are.
        compute: what rank 0 does.
        patient: let the others wait without the time limit of the process group.

    Raises:
        StillhouseError: `compute` raised it; on the other ranks a DataError with the same message, so that
            none of them waits for ever.
    """
    if world_size == 1:
        return compute()
    dist, group = _group(), _patient_group() if patient else None  # made by all before one goes to work
    result: list[Any] = [None, None]  # the value, or the message of an error
    failure: StillhouseError | None = None
    if rank == 0:
        try:
            result[0] = compute()
        except StillhouseError as error:
            failure, result[1] = error, str(error)
    dist.broadcast_object_list(result, src=0, group=group)
    if failure is not None:
        raise failure
    if result[1] is not None:
        raise DataError(result[1])
    value: T = result[0]
    return value


@contextlib.contextmanager
def _as_only_process() -> Iterator[None]:
    """Have the environment say that this process is the only one."""
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ.update(RANK="0", WORLD_SIZE="1")
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


@functools.cache
def _patient_group() -> Any:
    """All processes on the CPU, in operations that may wait for weeks."""
    return _group().new_group(backend="gloo", timeout=timedelta(weeks=4))


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
