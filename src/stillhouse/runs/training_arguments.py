"""The TrainingArguments of a run: our options, and what `train.hf` and `train.report_to` pass on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from stillhouse.config import nearest
from stillhouse.core.distributed import rank_and_size
from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.runs.config import RunConfig
from stillhouse.train.parallelism import let_models_be_whole

CONTROLLED_BY = {
    "output_dir": "output.folder",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "learning_rate": "train.lr",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.clip",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "bf16_full_eval": "student.dtype",
    "fp16_full_eval": "student.dtype",
    "gradient_checkpointing": "student.gradient_checkpointing",
    "activation_checkpointing": "student.gradient_checkpointing",
    "logging_steps": "train.log_every",
    "logging_strategy": "train.log_every",
    "save_strategy": "train.save_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "eval_strategy": "train.validate_every",
    "eval_steps": "train.validate_every",
    "per_device_eval_batch_size": "evaluate.batch_size",
    "load_best_model_at_end": "train.keep",
    "metric_for_best_model": "train.best_by",
    "greater_is_better": "train.best_by",
    "report_to": "train.report_to",
    "run_name": "name",
    "use_liger_kernel": "train.fused",
    "liger_kernel_config": "train.fused",
}
"""Field of TrainingArguments -> the option of a run that sets it."""
FIXED = frozenset(
    {"logging_nan_inf_filter", "remove_unused_columns", "label_names", "dataloader_drop_last", "disable_tqdm"}
    | {"auto_find_batch_size", "average_tokens_across_devices", "ignore_data_skip", "local_rank", "use_cpu"}
    | {"train_sampling_strategy", "save_only_model", "restore_callback_states_from_checkpoint"}
    | {"enable_jit_checkpoint", "include_num_input_tokens_seen"}
)
"""Fields of TrainingArguments that must keep their values: step, plan or resumption rely on them."""
WITHOUT_EFFECT = frozenset(
    {"label_smoothing_factor", "do_train", "do_eval", "do_predict", "eval_delay", "eval_on_start"}
    | {"prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"}
    | {"include_for_metrics", "batch_eval_metrics", "length_column_name", "resume_from_checkpoint"}
    | {"push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"}
    | {"hub_revision", "use_cache", "log_on_each_node"}
)
"""Fields of TrainingArguments for what a run does itself or not at all."""
PASSED_ON = frozenset(
    {"lr_scheduler_kwargs", "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2"}
    | {"adam_epsilon", "tf32", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"}
    | {"torch_compile", "torch_compile_backend", "torch_compile_mode", "neftune_noise_alpha"}
    | {"torch_empty_cache_steps", "logging_first_step", "log_level", "log_level_replica"}
    | {"project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "save_on_each_node"}
    | {"full_determinism", "accelerator_config", "parallelism_config", "dataloader_num_workers"}
    | {"dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"}
    | {"dataloader_multiprocessing_context", "dataloader_in_order", "ddp_find_unused_parameters"}
    | {"ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"}
    | {"fsdp", "fsdp_config", "deepspeed", "debug", "skip_memory_metrics"}
)
"""Fields of TrainingArguments that act in a run as transformers documents them."""
SCHEDULES = {"constant": "constant_with_warmup"}
"""Names of `train.schedule` that transformers has under another name: its `constant` has no warm-up."""


def training_arguments(
    config: RunConfig, folder: Path, kind: type | None = None, more: Mapping[str, Any] | None = None
) -> Any:
    """Hugging Face's TrainingArguments for a run, with its own saving and printing switched off.

    Args:
        config: the run.
        folder: where checkpoints go.
        kind: a subclass of TrainingArguments; default: that itself.
        more: its further fields.

    Raises:
        ConfigError: a field of `train.hf` is unknown, belongs to another option, or has a wrong value.
    """
    from transformers import TrainingArguments

    train = config.train
    _, ranks = rank_and_size()
    micro_batch_size = prompts_in_a_micro_batch(config, ranks)
    if faults := list(_invalid_fields(train.hf, TrainingArguments)):
        raise ConfigError(*faults)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        **optimisation(train),
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // (micro_batch_size * ranks),
        "max_grad_norm": train.clip,
        "bf16": train.precision == "bfloat16",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": list(train.report_to),
        "run_name": config.name,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
        "label_names": [],
        **({"optim": "adamw_torch_fused"} if torch.cuda.is_available() else {}),
        **train.hf,
        **(more or {}),
    }
    try:
        arguments = (kind or TrainingArguments)(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            Fault("train.hf", f"transformers does not accept it: {error}", got=str(train.hf))
        ) from error
    let_models_be_whole()  # those that are loaded from here on
    # With several GPUs one process would take all of them, with a batch for each (nn.DataParallel).
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class Optimised(Protocol):
    """What the settings of any training say about its length and its learning rate."""

    @property
    def epochs(self) -> float: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def log_every(self) -> int: ...


def optimisation(settings: Optimised) -> dict[str, Any]:
    """The fields of TrainingArguments that follow from them, for a trainer that prints nothing."""
    return {
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.lr,
        "lr_scheduler_type": SCHEDULES.get(settings.schedule, settings.schedule),
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "logging_steps": settings.log_every,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def prompts_in_a_micro_batch(config: RunConfig, ranks: int) -> int:
    """`train.micro_batch_size`; all prompts of the step on this rank where a budget of tokens splits them.

    Raises:
        ConfigError: the batch cannot be divided among so many processes.
    """
    train = config.train
    by_tokens = train.micro_batch_tokens is not None
    smallest = ranks if by_tokens else train.micro_batch_size * ranks
    if train.batch_size % smallest:
        times = "" if by_tokens else "train.micro_batch_size times "
        raise ConfigError(
            Fault(
                "train.batch_size",
                f"must be a multiple of {times}the number of processes",
                got=str(train.batch_size),
                allowed=f"multiples of {smallest}",
            )
        )
    return train.batch_size // ranks if by_tokens else train.micro_batch_size


def _invalid_fields(given: dict[str, Any], arguments: type) -> Iterator[Fault]:
    names = [field.name for field in dataclasses.fields(arguments) if field.init]
    for name, value in given.items():
        path = f"train.hf.{name}"
        if name in CONTROLLED_BY:
            yield Fault(path, "is set by another option", got=str(value), hint=f"Set {CONTROLLED_BY[name]}.")
        elif name in FIXED:
            yield Fault(path, "cannot be changed: the step relies on it", got=str(value), hint="Remove it.")
        elif name in WITHOUT_EFFECT:
            yield Fault(
                path, "has no effect: a run does that itself or not at all", got=str(value), hint="Remove it."
            )
        elif name not in names:
            problem = f"is not a field of transformers.TrainingArguments{nearest(name, names)}"
            yield Fault(path, problem, got=str(value))


def check_loggers(names: tuple[str, ...]) -> None:
    """Make sure that the loggers of `train.report_to` exist and are installed.

    Raises:
        ConfigError: transformers has no logger of that name.
        EnvironmentFault: the logger's package is not installed.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_reporting_integration_callbacks,
    )

    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    faults = [
        Fault(
            "train.report_to", f"no logger is called {name!r}{nearest(name, known)}", allowed=", ".join(known)
        )
        for name in names
        if name not in known
    ]
    if faults:
        raise ConfigError(*faults)
    for name in names:
        for callback in get_reporting_integration_callbacks(
            [name] if name in INTEGRATION_TO_CALLBACK else []
        ):
            try:
                callback()
            except (RuntimeError, ImportError) as error:
                raise EnvironmentFault(
                    f"train.report_to: {name} cannot be used ({error}). Install its package, or leave it out."
                ) from error
