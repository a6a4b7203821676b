"""The TrainingArguments of a run: our options, and what `train.hf` and `train.report_to` pass on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stillhouse.config import nearest
from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.runs.config import RunConfig

CONTROLLED_BY = {
    "output_dir": "output.folder",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "learning_rate": "train.lr",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.clip",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "bf16": "train.precision",
    "gradient_checkpointing": "student.gradient_checkpointing",
    "logging_steps": "train.log_every",
    "save_strategy": "train.save_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "eval_strategy": "train.validate_every",
    "load_best_model_at_end": "train.keep",
    "report_to": "train.report_to",
    "run_name": "name",
}
"""Field of TrainingArguments -> the option of a run that sets it."""
FIXED = ("logging_nan_inf_filter", "remove_unused_columns", "label_names")
"""Fields of TrainingArguments that must keep their values."""


def training_arguments(config: RunConfig, folder: Path) -> Any:
    """Hugging Face's TrainingArguments for a run, with its own saving and printing switched off.

    Args:
        config: the run.
        folder: where checkpoints go.

    Raises:
        ConfigError: a field of `train.hf` is unknown, belongs to another option, or has a wrong value.
    """
    from transformers import TrainingArguments

    train = config.train
    smallest_batch = train.micro_batch_size * max(1, int(os.environ.get("WORLD_SIZE") or 1))
    if train.batch_size % smallest_batch:
        raise ConfigError(
            Fault(
                "train.batch_size",
                "must be a multiple of train.micro_batch_size times the number of processes",
                got=str(train.batch_size),
                allowed=f"multiples of {smallest_batch}",
            )
        )
    if faults := list(_invalid_fields(train.hf, TrainingArguments)):
        raise ConfigError(*faults)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // smallest_batch,
        "learning_rate": train.lr,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.clip,
        "seed": train.seed,
        "data_seed": train.seed,
        "bf16": train.precision == "bfloat16",
        "logging_steps": train.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": list(train.report_to),
        "run_name": config.name,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": [],
        **train.hf,
    }
    try:
        arguments = TrainingArguments(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            Fault("train.hf", f"transformers does not accept it: {error}", got=str(train.hf))
        ) from error
    # With several GPUs one process would take all of them, with a batch for each (nn.DataParallel).
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _invalid_fields(given: dict[str, Any], arguments: type) -> Iterator[Fault]:
    names = [field.name for field in dataclasses.fields(arguments) if field.init]
    for name, value in given.items():
        path = f"train.hf.{name}"
        if name in CONTROLLED_BY:
            yield Fault(path, "is set by another option", got=str(value), hint=f"Set {CONTROLLED_BY[name]}.")
        elif name in FIXED:
            yield Fault(path, "cannot be changed: the step relies on it", got=str(value), hint="Remove it.")
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
