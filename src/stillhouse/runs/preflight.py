"""What can be refused before anything is loaded: missing files and folders, options that no trainer knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stillhouse.core.types import Prompt
from stillhouse.data.datasets import DatasetConfig
from stillhouse.errors import ConfigError, DataError, Fault, ModelError
from stillhouse.models.paths import resolve_adapter, resolve_path
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import default_folder
from stillhouse.runs.training_arguments import check_loggers, training_arguments


def preflight(config: RunConfig) -> None:
    """Look for every file and folder that a run names, and at its options for Hugging Face's trainer.

    Raises:
        ConfigError: with everything that is missing or unknown, at once.
        EnvironmentFault: a package that a path or a logger needs is not installed.
    """
    found: list[Fault | str] = [*_missing_data(config), *_missing_models(config)]
    try:
        training_arguments(config, default_folder(config))
    except ConfigError as error:
        found += error.faults
    if found:
        raise ConfigError(*found)
    check_loggers(config.train.report_to)


def _missing_data(config: RunConfig) -> Iterator[str]:
    sources: dict[str, DatasetConfig | None] = {
        "data.train": config.data.train,
        "data.valid": config.data.valid,
        "data.text": config.data.text,
        "evaluate.data": config.evaluate.data,
    }
    for index, task in enumerate(config.evaluate.tasks):
        sources |= {f"evaluate.tasks[{index}].{name}": source for name, source in task.datasets().items()}
    for name, source in sources.items():
        found = getattr(source, "found", None)
        if found is None:
            continue
        try:
            found()
        except DataError as error:
            yield f"{name}: {error}"


def _missing_models(config: RunConfig) -> Iterator[str]:
    teacher = config.teacher.model_to_load() if config.teacher is not None else None
    for name, model in (("student", config.student), ("teacher", teacher)):
        for field in ("path", "tokenizer", "adapter"):
            path = getattr(model, field, None)
            if path is None:
                continue
            try:
                (resolve_adapter if field == "adapter" else resolve_path)(path)
            except ModelError as error:
                yield f"{name}.{field}: {error}"


def check_room(
    config: RunConfig, train: Sequence[Prompt], held_out: Sequence[Prompt], contexts: dict[str, int | None]
) -> None:
    """Refuse sequences that are longer than a model's context, before hours are spent on the others.

    Args:
        config: the run.
        train: the prompts to train on.
        held_out: the prompts of the evaluation.
        contexts: the most tokens that "student" and "teacher" can take; None: nobody knows.

    Raises:
        ConfigError: prompt and response together can be too long for a model.
    """
    limit = config.data.max_response
    answers = config.evaluate.sampling
    answer = answers.max_tokens if "max_tokens" in answers.model_fields_set else limit
    lengths = {
        "data.train": longest(config, train),
        "evaluation": max((len(p.token_ids) + answer for p in held_out), default=0),
    }
    faults = [
        Fault(
            "data.max_response",
            f"the longest prompt and response of {name} may take {length} tokens",
            allowed=f"{context}, the context of the {model}",
            hint="Lower data.max_prompt or data.max_response"
            + (", or evaluate.sampling.max_tokens." if name == "evaluation" and answer != limit else "."),
        )
        for name, length in lengths.items()
        for model, context in contexts.items()
        if context is not None and length > context
    ]
    if faults:
        raise ConfigError(*faults)


def longest(config: RunConfig, train: Sequence[Prompt]) -> int:
    """The most tokens that a prompt and a response of the training may take together."""
    own = max(len(p.token_ids) + len(p.response_ids or ()) for p in train)
    written = max(len(p.token_ids) for p in train) + config.data.max_response
    needs = config.responses.requirements()
    if not any("text" in need.signals for need in needs.models):
        return own
    return max(own, written) if "responses" in needs.data else written


def context_of(model_config: Any) -> int | None:
    """The most tokens that a model with this Hugging Face configuration can take; None if it does not say."""
    text = model_config.get_text_config(decoder=True)
    found = getattr(text, "max_position_embeddings", None)
    return int(found) if found else None
