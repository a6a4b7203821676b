"""Evaluates one system of a run on held-out prompts and keeps the result in the run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from stillhouse.data import Data, load_prompts
from stillhouse.data.template import Encoder
from stillhouse.errors import ModelError
from stillhouse.evaluate import answer, likelihood
from stillhouse.evaluate.likelihood import references_of
from stillhouse.models import parameters_of
from stillhouse.runner.assemble import Parts, assemble
from stillhouse.runner.folder import RunFolder
from stillhouse.runner.preflight import check_room, preflight
from stillhouse.runner.resolve import resolve
from stillhouse.runner.vocabularies import Translation
from stillhouse.settings import RunConfig
from stillhouse.types import Prompt


def held_out(config: RunConfig, data: Data, tokenizer: Any) -> tuple[Prompt, ...]:
    """The prompts of evaluate.data, or else of data.valid."""
    if config.evaluate.data is None:
        return data.valid[: config.evaluate.limit]
    encoder = data.encoder or Encoder(config.data.template, tokenizer)
    found = load_prompts("eval", config.evaluate.data, config.data, encoder, needs_response=True)
    return found.prompts[: config.evaluate.limit]


logger = logging.getLogger("stillhouse")

TASK = "held-out prompts"


def evaluate_system(
    parts: Parts, prompts: tuple[Prompt, ...], folder: RunFolder, system: str, model: nn.Module
) -> dict[str, float]:
    """Answers, likelihood and fidelity of one system; nothing if there are no held-out prompts or it is done.

    Args:
        parts: a loaded run.
        prompts: what `held_out` gave.
        folder: where the result goes.
        system: "teacher", "student before" or "student after".
        model: whose weights to use.
    """
    if not prompts or (system != "student after" and folder.has_evaluation(system)):
        return {}
    translation = parts.translation
    if model is parts.teacher and translation is not None:
        parts, prompts = as_teacher(parts, translation), translation.prompts(prompts)
    metrics, settings, rows = measure(parts, model, prompts, title=f"Evaluating {system}")
    label = parts.config.name if system == "student after" else system
    folder.write_evaluation(
        system, {"label": label, "task": TASK, "settings": settings, "metrics": metrics}, rows
    )
    return metrics


def as_teacher(parts: Parts, translation: Translation) -> Parts:
    """The parts as the teacher sees them: its tokenizer, its end token, its ids."""
    tokenizer = translation.encoder.tokenizer
    return replace(parts, tokenizer=tokenizer, facts=translation.facts, vocab=len(tokenizer))


def measure(
    parts: Parts, model: nn.Module, prompts: tuple[Prompt, ...], title: str | None
) -> tuple[dict[str, float], dict[str, Any], list[dict[str, Any]]]:
    """Metrics, the settings they were taken with, and one row for each answer."""
    config = parts.config.evaluate
    sampling = parts.limited(config.sampling)
    training = model.training
    model.eval()
    answers = answer(parts.engine(model), prompts, sampling, config.seeds, parts.tokenizer, title=title)
    options: dict[str, Any] = {
        "pad_id": parts.facts.pad_id,
        "vocab": parts.vocab,
        "batch_size": config.batch_size,
    }
    if model is not parts.teacher and parts.teacher is not None and parts.translation is None:
        options["teacher"] = parts.teacher
    on_references = likelihood(model, references_of(prompts), **options)
    metrics = {
        **answers.metrics,
        "loss": on_references.loss,
        "parameters": parameters_of(model)["parameters"],
    }
    if on_references.fidelity is not None:
        metrics |= on_references.fidelity.as_metrics()
        own = likelihood(model, answers.responses, **options).fidelity
        assert own is not None
        metrics |= {f"{name}_on_own_text": value for name, value in own.as_metrics().items()}
    model.train(training)
    settings = {
        "sampling": sampling.model_dump(mode="json"),
        "seeds": list(config.seeds),
        "prompts": len(prompts),
        "rouge": "rouge-score rougeL F, stemmer, best over references",
        "loss": "nats per reference token",
        "fidelity": "on references; _on_own_text: on the student's own answers of the first seed",
    }
    return metrics, settings, answers.rows


def evaluate_model(
    model: str,
    data: Path,
    *,
    teacher: str | None,
    template: str,
    sampling: dict[str, Any],
    seeds: Sequence[int],
    limit: int | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a model by itself, outside a run.

    Returns:
        System, settings and metrics as the run folder has them, and one row for each answer.

    Raises:
        StillhouseError: the model, the teacher or the data cannot be used.
    """
    tree: dict[str, Any] = {
        "student": {"path": model, "dtype": "auto"},
        "data": {
            "train": str(data),
            "template": template,
            "max_response": sampling["max_tokens"],
            "no_response": "drop",
        },
        "objective": "cross_entropy",
        "evaluate": {"sampling": sampling, "seeds": list(seeds), "limit": limit},
    }
    if teacher is not None:
        tree["teacher"] = {"kind": "live", "path": teacher}
    config = resolve(tree).config
    preflight(config)
    parts = assemble(config)
    if parts.translation is not None:
        raise ModelError(
            f"--teacher: {teacher} has another tokenizer than {model}. KL and agreement compare token with "
            "token; evaluate the two apart, or take a teacher with the same tokenizer."
        )
    prompts = tuple(prompt for prompt in parts.data.train if prompt.references)[:limit]
    dropped = parts.data.report["sets"][0]["dropped"]
    if dropped:
        told = ", ".join(f"{count} x {reason}" for reason, count in dropped.items())
        logger.warning("%s: rows left out: %s", data, told)
    check_room(config, prompts, prompts, parts.contexts)
    metrics, settings, rows = measure(parts, parts.student, prompts, title=f"Evaluating {model}")
    return {
        "system": model,
        "task": TASK,
        "data": str(data),
        "settings": settings,
        "metrics": metrics,
    }, rows
