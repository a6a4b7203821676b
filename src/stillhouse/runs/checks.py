"""What can be refused before any weights load: missing files, trainer options, too long sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillhouse.config import walk
from stillhouse.core.requirements import teacher_path
from stillhouse.core.types import Prompt
from stillhouse.data.datasets import DatasetConfig
from stillhouse.errors import ConfigError, DataError, Fault, ModelError
from stillhouse.files import existing_ancestor
from stillhouse.models import ModelConfig
from stillhouse.models.paths import model_files, resolve_adapter
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import default_folder
from stillhouse.runs.training_arguments import check_loggers, training_arguments
from stillhouse.schedules import Schedule
from stillhouse.train.config import interval
from stillhouse.train.parallelism import check_launcher, shards_weights


def preflight(config: RunConfig, engine_here: bool = True) -> None:
    """Check every file and folder that a run names, and its options for Hugging Face's trainer.

    Args:
        config: of the run.
        engine_here: whether the engine runs on this machine, so that its package and device must be here.

    Raises:
        ConfigError: with everything that is missing or unknown, at once.
        EnvironmentFault: a package that a path, a logger or a backend needs is not installed, or the launcher
            asks for what a run cannot do.
    """
    check_launcher(config.train.hf)
    faults: list[Fault | str] = [*_missing_data(config), *_missing_models(config)]
    start = f" (Relative paths start at the working directory, {Path.cwd()}.)"
    faults = [f"{fault}{start}" for fault in faults]
    try:
        faults += _unfit_teachers(config, training_arguments(config, default_folder(config)))
    except ConfigError as error:
        faults += error.faults
    faults += [*_unfit_dtypes(config), *_files_for_folders(config)]
    if faults:
        raise ConfigError(*faults)
    if engine_here:
        config.engine.check_installed()
    config.train.fused.check_installed()
    check_loggers(config.train.report_to)


def _files_for_folders(config: RunConfig) -> Iterator[Fault]:
    """Caches that could not be written to, because a file is where their folder should be."""
    places = {"data.token_cache": config.data.token_cache}
    for name, teacher in config.all_teachers.items():
        if teacher.caches:
            places[f"{teacher_path(name)}.folder"] = getattr(teacher, "folder", False)
    for name, place in places.items():
        if isinstance(place, Path) and not (above := existing_ancestor(place)).is_dir():
            yield Fault(name, f"{above} is a file, not a folder", got=str(place))


def _unfit_teachers(config: RunConfig, arguments: Any) -> Iterator[Fault]:
    """Teachers that read the student's own weights, where each process has a share of these alone; and the
    evaluation of a teacher that processes share."""
    if config.evaluate.teacher and config.teacher is not None and config.teacher.sharded:
        problem = "the processes share the teacher (teacher.shard), and it cannot write"
        yield Fault("evaluate.teacher", problem, got="true", hint="Set it to false.")
    if not shards_weights(arguments):
        return
    for name, teacher in config.all_teachers.items():
        if teacher.of_student:
            yield Fault(
                f"{teacher_path(name)}.kind",
                "reads the weights of the student, of which each process has a share (FSDP, ZeRO-3)",
                got=teacher.kind,
                hint="Train with whole weights: DDP, or ZeRO-2.",
            )


def _unfit_dtypes(config: RunConfig) -> Iterator[Fault]:
    """float16 in training without a GPU: AdamW's epsilon is 0 in it, and the weights are NaN within steps."""
    import torch

    if config.student.dtype == "float16" and not torch.cuda.is_available():
        yield Fault(
            "student.dtype",
            "float16 cannot be trained on a CPU: the weights become NaN",
            got="float16",
            allowed="float32, bfloat16",
        )


def data_sources(config: RunConfig) -> dict[str, DatasetConfig]:
    """Every set of rows that a run reads, by its path in the configuration."""
    sources: dict[str, DatasetConfig | None] = {
        "data.train": config.data.train,
        "data.valid": config.data.valid,
        "data.text": config.data.text,
        "evaluate.data": config.evaluate.data,
    }
    for index, task in enumerate(config.evaluate.tasks):
        sources |= {f"evaluate.tasks[{index}].{name}": source for name, source in task.datasets().items()}
    return {path: source for path, source in sources.items() if source is not None}


def _missing_data(config: RunConfig) -> Iterator[str]:
    for path, source in data_sources(config).items():
        try:
            source.check_found()
        except (DataError, ConfigError) as error:
            yield f"{path}: {error}"


def _missing_models(config: RunConfig) -> Iterator[str]:
    teachers = {teacher_path(name): teacher.model_to_load() for name, teacher in config.all_teachers.items()}
    for name, model in {"student": config.student, **teachers}.items():
        for field in ("path", "tokenizer", "adapter"):
            path = getattr(model, field, None)
            if path is None:
                continue
            try:
                (resolve_adapter if field == "adapter" else model_files)(path)
            except (ModelError, ConfigError) as error:
                yield f"{name}.{field}: {error}"


def check_context_lengths(
    config: RunConfig,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    context_lengths: Mapping[str, int | None],
) -> None:
    """Refuse sequences that are longer than a model's context, before hours are spent on the others.

    Args:
        config: the run.
        train: the prompts to train on.
        held_out: the prompts of the evaluation.
        context_lengths: of "student" and "teacher", in tokens; None where the model does not say.

    Raises:
        ConfigError: prompt and response together can be too long for a model.
    """
    limit = config.data.max_response
    sampling = config.evaluate.sampling
    answer_limit = sampling.max_tokens if "max_tokens" in sampling.model_fields_set else limit
    lengths = {
        "data.train": longest_sequence(config, train),
        "evaluation": max((len(p.token_ids) + answer_limit for p in held_out), default=0),
    }
    faults = [
        Fault(
            "data.max_response",
            f"the longest prompt and response of {name} can take {length} tokens",
            allowed=f"{context}, the context of the {model}",
            hint="Lower data.max_prompt or data.max_response"
            + (
                ", or evaluate.sampling.max_tokens."
                if name == "evaluation" and answer_limit != limit
                else "."
            ),
        )
        for name, length in lengths.items()
        for model, context in context_lengths.items()
        if context is not None and length > context
    ]
    if faults:
        raise ConfigError(*faults)


def longest_sequence(config: RunConfig, train: Sequence[Prompt]) -> int:
    """The most tokens that a prompt and a response of the training can take together."""
    dataset = max(len(p.token_ids) + max(len(p.response_ids or ()), len(p.rejected_ids or ())) for p in train)
    generated = max(len(p.token_ids) for p in train) + config.data.max_response
    needs = config.responses.requirements()
    if not any("text" in need.signals for need in needs.models):
        return dataset
    return max(dataset, generated) if "responses" in needs.data else generated


def check_length(config: RunConfig, prompts: int) -> list[str]:
    """What does not fit the length of the training, once the number of prompts is known.

    Returns:
        What is no mistake for sure, but should be known.

    Raises:
        ConfigError: a part would begin after the end of the training.
    """
    train = config.train
    per_epoch = max(1, -(-prompts // train.batch_size))
    steps = train.max_steps or math.ceil(train.epochs * per_epoch)
    facts = replace(config.facts, epochs=steps / per_epoch, max_steps=None)
    faults = [
        *config.objective.check_in_run("objective", facts),
        *config.responses.check_in_run("responses", facts),
    ]
    if faults:
        raise ConfigError(*faults)
    follows = any("dev_loss" in schedule.requirements().measured for schedule in _schedules(config))
    if not follows or train.validate_every == "never" or interval(train.validate_every, per_epoch) < steps:
        return []
    return [
        f"train.validate_every={train.validate_every}: the first validation after the start ends the "
        f"{steps:,} steps, so what follows the validation loss never moves. Take a share of an epoch: 0.1"
    ]


def _schedules(config: RunConfig) -> list[Schedule]:
    found: list[Schedule] = []

    def visit(path: str, value: Any) -> Any:
        if isinstance(value, Schedule):
            found.append(value)
        return value

    walk(config, visit)
    return found


def context_of_files(model: ModelConfig) -> int | None:
    """The most tokens that a model takes, by the configuration in its files; None if it does not say."""
    from transformers import AutoConfig

    if model.path is None or model.gguf_file is not None:
        return None
    try:
        return context_length(
            AutoConfig.from_pretrained(
                model_files(model.path).model, trust_remote_code=model.trust_remote_code
            )
        )
    except (OSError, ValueError, KeyError):  # told where the model is loaded
        return None


def context_length(model_config: Any) -> int | None:
    """The most tokens that a model with this Hugging Face configuration takes; None if it does not say."""
    text = model_config.get_text_config(decoder=True)
    found = getattr(text, "max_position_embeddings", None)
    return int(found) if found else None
