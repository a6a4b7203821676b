"""Sees that the parallelism that was asked for is the one that runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from stillhouse.core.distributed import GROUPS, YES, group_sizes, rank_and_size
from stillhouse.core.launcher import launched_with
from stillhouse.errors import EnvironmentFault

KINDS = {
    "FSDP": ("ACCELERATE_USE_FSDP", "fsdp"),
    "DEEPSPEED": ("ACCELERATE_USE_DEEPSPEED", "deepspeed"),
}
"""Name in accelerate's DistributedType -> the environment variable of its launcher, and the field of
TrainingArguments."""

UNKNOWN = {
    "tp_size": "tensor parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}
"""Sizes in accelerate's ParallelismConfig -> the parallelism that they ask for."""


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
    for kind, source in asked_for(vars(arguments)):
        if active != kind:
            raise EnvironmentFault(
                f"{source} asks for {kind}, and accelerate runs {active} on {accelerator.device.type} here: "
                "each process would hold the whole model. FSDP and DeepSpeed need GPUs that torch sees "
                "(and the package deepspeed); without them, train without."
            )
    _, started = rank_and_size()
    if accelerator.num_processes != started:
        raise EnvironmentFault(
            f"WORLD_SIZE is {started}, and the process group has {accelerator.num_processes}: each process "
            "would train by itself. Start them with torchrun or accelerate launch."
        )
    config, asked = accelerator.parallelism_config, _sizes(arguments.parallelism_config)
    if asked is not None and config is None:
        raise EnvironmentFault(
            "ACCELERATE_USE_PARALLELISM_CONFIG asks for groups of processes, and accelerate makes none: it "
            "takes no other word than true."
        )


@contextmanager
def groups_refused_in_words() -> Iterator[None]:
    """Inside of it accelerate's refusal of a ParallelismConfig is a message for the user.

    Raises:
        EnvironmentFault: it refuses one, as on a CPU, where it leaves FSDP out.
    """
    try:
        yield
    except ValueError as error:
        if "ParallelismConfig" not in str(error):
            raise
        raise EnvironmentFault(
            f"accelerate does not run the sizes of its parallelism_config here: {error} FSDP2 needs GPUs "
            "that torch sees; without them, train without."
        ) from error


def add_gradients_up_in_fp32(accelerator: Any) -> None:
    """Have FSDP2 do so over micro-batches and processes, as DDP and one process do.

    With mixed precision accelerate has it keep and send gradients in that precision.

    Args:
        accelerator: of the trainer, which has not wrapped the model yet.
    """
    import torch

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and (policy := plugin.mixed_precision_policy) is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def shards_weights(arguments: Any) -> bool:
    """Whether these TrainingArguments and the launcher ask for weights that are sharded: FSDP, or ZeRO-3."""
    kinds = {kind for kind, _ in asked_for(vars(arguments))}
    if "DEEPSPEED" in kinds:
        plugin = arguments.deepspeed_plugin
        return plugin is not None and plugin.deepspeed_config["zero_optimization"]["stage"] == 3
    return "FSDP" in kinds


def let_models_be_whole() -> None:
    """Have transformers take every model but the trained one for what it is, while DeepSpeed shards that.

    Its flag of ZeRO-3 is global: with it `from_pretrained` would share any model out among the processes, and
    `generate` of any model would wait for all of them.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def check_launcher(hf: Mapping[str, Any]) -> None:
    """Refuse what a launcher's configuration asks for and a run cannot do, before anything is loaded.

    Args:
        hf: `train.hf`.

    Raises:
        EnvironmentFault: weights that the first process alone loads, FSDP of the first version, DeepSpeed
            where it is not installed or no launcher has started the process, a parallelism that a run does
            not know, or sizes of groups that are not those of the processes.
    """
    kinds = dict(asked_for(hf))
    _check_sizes(hf.get("parallelism_config"), "FSDP" in kinds)
    if "DEEPSPEED" in kinds:
        _check_deepspeed(kinds["DEEPSPEED"])
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in YES:
        return
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in YES:
        raise EnvironmentFault(
            "fsdp_cpu_ram_efficient_loading lets the first process alone load weights, and would leave the "
            "teachers of the others without any. Set it to false in accelerate's configuration, as "
            "`stillhouse init --launch fsdp2` does."
        )
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise EnvironmentFault(
            "FSDP of version 1 is asked for, and the loss over the student's head knows version 2. Set "
            "fsdp_version: 2 in accelerate's configuration; `stillhouse init --launch fsdp2` writes one."
        )


def _sizes(given: Any) -> dict[str, int] | None:
    """The sizes of groups that are asked for, by a ParallelismConfig of TrainingArguments or the launcher."""
    return group_sizes() if given is None else {name: int(getattr(given, name)) for name in GROUPS}


def _check_sizes(given: Any, sharded: bool) -> None:
    """Of accelerate's ParallelismConfig: they have to be those of data parallelism, and of all processes.

    Args:
        given: `parallelism_config` of TrainingArguments.
        sharded: whether FSDP is asked for.
    """
    if isinstance(given, Mapping):
        raise EnvironmentFault(
            "train.hf.parallelism_config cannot be given in a run: sizes of groups of processes belong to "
            "accelerate's configuration. `stillhouse init --launch hsdp` writes one."
        )
    sizes, (_, started) = _sizes(given), rank_and_size()
    if sizes is None:
        if launched_with("parallelism_config_"):
            raise EnvironmentFault(
                "accelerate launch was given sizes of groups, --parallelism_config_..., and leaves them out: "
                "it reads them only where its file has a section parallelism_config. `stillhouse init "
                "--launch hsdp` writes one; give it as --config_file."
            )
        return
    for name, kind in UNKNOWN.items():
        if sizes[name] > 1:
            raise EnvironmentFault(
                f"accelerate's parallelism_config asks for {name}: {sizes[name]}, which is {kind}, and a run "
                "is data-parallel alone: DDP, or weights sharded over all processes (FSDP2, ZeRO) or over "
                "those of a replica (HSDP)."
            )
    replicas, shards = sizes["dp_replicate_size"], sizes["dp_shard_size"]
    asks = f"accelerate's parallelism_config asks for dp_replicate_size: {replicas}, dp_shard_size: {shards}"
    if shards > 1 and not sharded:
        raise EnvironmentFault(
            f"{asks}, and not for FSDP, which would shard: each process would hold the whole model. Set "
            "distributed_type: FSDP, as `stillhouse init --launch hsdp` does, or leave the sizes out."
        )
    if shards == 1 and sharded:
        raise EnvironmentFault(
            f"{asks}, and for FSDP, which would have nothing to shard over. Set dp_shard_size to the number "
            "of processes on a machine, or leave the sizes out to shard over all."
        )
    if replicas * shards not in (1, started):
        hint = f"dp_replicate_size: {started // shards}" if started % shards == 0 else "sizes that do"
        raise EnvironmentFault(
            f"{asks}, which makes {replicas * shards} processes, and {started} were started. Set {hint}, in "
            "its file or by --parallelism_config_dp_replicate_size of accelerate launch."
        )


def _check_deepspeed(source: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise EnvironmentFault(
            f"{source} asks for DeepSpeed, which is not installed. Install it with: "
            "pip install 'stillhouse[deepspeed]'"
        )
    if "LOCAL_RANK" not in os.environ:
        raise EnvironmentFault(
            f"{source} asks for DeepSpeed, and no launcher has started this process. Start it with torchrun "
            "or accelerate launch."
        )


def check_launched(arguments: Any) -> None:
    """Refuse FSDP in a process that no launcher has started, where transformers stops with a traceback, and
    a launcher that decides the precision.

    Raises:
        EnvironmentFault: it is asked for.
    """
    check_launcher(vars(arguments))
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and not (precision == "bf16" and arguments.bf16):
        raise EnvironmentFault(
            f"accelerate's configuration says mixed_precision: {precision}, and train.precision of the run "
            f"{'bfloat16' if arguments.bf16 else 'float32'}. Set it to no there: the run decides."
        )
    if arguments.fsdp and int(arguments.fsdp_config.get("version", 2)) != 2:
        raise EnvironmentFault("train.hf.fsdp_config.version: FSDP is supported in version 2.")
    if arguments.fsdp and rank_and_size()[1] == 1:
        raise EnvironmentFault(
            "train.hf.fsdp asks for FSDP, and this is a single process. Start it with torchrun or accelerate "
            "launch."
        )


def asked_for(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, where it is asked for): by a launcher, or by fields of TrainingArguments."""
    for kind, (variable, field) in KINDS.items():
        if os.environ.get(variable, "").lower() in YES:
            yield kind, variable
        elif arguments.get(field):
            yield kind, f"train.hf.{field}"
