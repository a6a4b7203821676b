"""Sees that the parallelism that was asked for is the one that runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from stillhouse.errors import EnvironmentFault

YES = frozenset({"1", "true", "yes", "y", "on", "t"})
KINDS = {
    "FSDP": ("ACCELERATE_USE_FSDP", "fsdp"),
    "DEEPSPEED": ("ACCELERATE_USE_DEEPSPEED", "deepspeed"),
}
"""Name in accelerate's DistributedType -> the environment variable of its launcher, and the field of
TrainingArguments."""


def check_parallelism(accelerator: Any, arguments: Any) -> None:
    """Refuse to train in another way than was asked for.

    accelerate switches FSDP on where there is an accelerator, and on a CPU goes on with DDP or a single
    process without a word: a model that was to be sharded would be whole in each process.

    Args:
        accelerator: of the trainer.
        arguments: its TrainingArguments.

    Raises:
        EnvironmentFault: FSDP or DeepSpeed is asked for and not active, or there are fewer processes than the
            launcher started.
    """
    active = str(accelerator.distributed_type).rpartition(".")[2]
    for kind, source in _asked(arguments):
        if active != kind:
            raise EnvironmentFault(
                f"{source} asks for {kind}, and accelerate runs {active} on {accelerator.device.type} here: "
                "each process would hold the whole model. FSDP and DeepSpeed need GPUs that torch sees "
                "(and the package deepspeed); without them, train without."
            )
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if accelerator.num_processes != started:
        raise EnvironmentFault(
            f"WORLD_SIZE is {started}, and the process group has {accelerator.num_processes}: each process "
            "would train by itself. Start them with torchrun or accelerate launch."
        )


def check_launched(arguments: Any) -> None:
    """Refuse FSDP in a process that no launcher has started, where transformers stops with a traceback.

    Raises:
        EnvironmentFault: it is asked for.
    """
    if arguments.fsdp and int(os.environ.get("WORLD_SIZE") or 1) == 1:
        raise EnvironmentFault(
            "train.hf.fsdp asks for FSDP, and this is a single process. Start it with torchrun or accelerate "
            "launch."
        )


def _asked(arguments: Any) -> Iterator[tuple[str, str]]:
    """(kind, where it is asked for)."""
    for kind, (variable, field) in KINDS.items():
        if os.environ.get(variable, "").lower() in YES:
            yield kind, variable
        elif getattr(arguments, field, None):
            yield kind, f"train.hf.{field}"
