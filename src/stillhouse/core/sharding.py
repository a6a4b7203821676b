"""What each parallelism shards over the processes of a run, as data for estimates and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Parallelism = Literal["ddp", "fsdp2", "hsdp", "zero2", "zero3"]
Part = Literal["weights", "gradients", "optimizer"]

SHARDED: Mapping[Parallelism, frozenset[Part]] = {
    "ddp": frozenset(),
    "zero2": frozenset({"gradients", "optimizer"}),
    "fsdp2": frozenset({"weights", "gradients", "optimizer"}),
    "hsdp": frozenset({"weights", "gradients", "optimizer"}),
    "zero3": frozenset({"weights", "gradients", "optimizer"}),
}
"""Of the student. What else a process has is whole in each of them: activations, the chunk of the loss over
the head, and the teachers, unless they are sharded too (`shard: fsdp2`), which divides their weights alone.

With sharded weights three things are whole for a while: the layer that is being computed, with the one that
is gathered meanwhile; the head, from the first forward pass of a step to its last backward pass; and all
weights while the student writes or is evaluated."""


ADDED_UP_WHOLE: frozenset[Parallelism] = frozenset({"fsdp2", "hsdp"})
"""Where the gradients of several micro-batches are whole in each process until the last one, which shards
them: once a step over the network. accelerate's `sync_each_batch` shards those of each."""


def share(parallelism: Parallelism, part: Part, processes: int) -> float:
    """The share of a part of the student's memory that one process keeps.

    Args:
        parallelism: of the run; a single process is "ddp" over one.
        part: weights, their gradients, or the states of the optimiser.
        processes: over which is sharded: all of the run, on all its machines; with "hsdp" those of a replica.

    Example:
        >>> share("zero2", "optimizer", 8)
        0.125
    """
    return 1 / processes if part in SHARDED[parallelism] else 1.0
