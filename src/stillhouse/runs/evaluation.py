"""Evaluates one system of a run on held-out prompts and keeps the result in the run folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from stillhouse.core.journal import Journal, content_digest
from stillhouse.core.types import Prompt
from stillhouse.data import Data, load_prompts
from stillhouse.data.tokenise import Encoder
from stillhouse.evaluate import answer
from stillhouse.evaluate.answers import prompts_digest, questions_digest
from stillhouse.evaluate.likelihood import closeness
from stillhouse.evaluate.tasks import Bench, Probe
from stillhouse.evaluate.tasks.asking import Asking
from stillhouse.models import fingerprint, parameter_counts, unwrap
from stillhouse.runs.build import Parts
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.preflight import context_of
from stillhouse.runs.tokenizers import Translation

TASK = "held-out prompts"


def held_out(config: RunConfig, data: Data, tokenizer: Any) -> tuple[Prompt, ...]:
    """The prompts of evaluate.data, or else of data.valid."""
    if config.evaluate.data is None:
        return data.valid[: config.evaluate.limit]
    encoder = data.encoder or Encoder(config.data.template, tokenizer)
    found = load_prompts("eval", config.evaluate.data, config.data, encoder, needs_response=True)
    return found.prompts[: config.evaluate.limit]


def check_tasks(config: RunConfig, tokenizer: Any) -> None:
    """Read the questions of every task, so that what is wrong with them is told before a training.

    Raises:
        ConfigError: a task has no rows.
        DataError: its rows cannot be read, or none is left.
    """
    for task in config.evaluate.single_tasks():
        if isinstance(task, Asking):
            encoder = Encoder(task.template or config.data.template, tokenizer)
            task.questions(encoder, config.data, config.evaluate.data or config.data.valid)


def evaluate_system(
    parts: Parts, prompts: tuple[Prompt, ...], folder: RunFolder, system: str, model: nn.Module
) -> None:
    """Answers, likelihood and fidelity of one system on the held-out prompts, then the further tasks.

    What is done already is not done again, and an interrupted part goes on where it stopped.

    Args:
        parts: a loaded run.
        prompts: what `held_out` gave; none: only the tasks.
        folder: where the results go.
        system: "teacher", "student before" or "student after".
        model: whose weights to use.
    """
    translation = parts.translation
    if model is parts.teacher and translation is not None:
        parts, prompts = as_teacher(parts, translation), translation.prompts(prompts)
    config = parts.config
    label = config.name if system == "student after" else system
    weights_of = functools.cache(fingerprint)  # nothing trains meanwhile
    if prompts:
        _on_held_out(parts, prompts, folder, system, model, label, weights_of)
    for task in config.evaluate.single_tasks():
        if task.of_teacher or model is not parts.teacher:
            bench = bench_of(parts, folder, system, model, task, label, weights_of)
            evaluate_task(bench, task, folder, label)


def _on_held_out(
    parts: Parts,
    prompts: tuple[Prompt, ...],
    folder: RunFolder,
    system: str,
    model: nn.Module,
    label: str,
    weights_of: Callable[[nn.Module], str],
) -> None:
    answers = {
        "prompts": prompts_digest(prompts),
        "sampling": parts.limited(parts.config.evaluate.sampling).model_dump(mode="json"),
        "weights": weights_of(model),
    }
    teacher = None if parts.teacher is None else weights_of(parts.teacher)
    header = content_digest({**answers, "seeds": parts.config.evaluate.seeds, "teacher": teacher})
    if folder.has_evaluation(system, header=header):
        return
    journal = Journal(folder.partial(system), answers)
    metrics, settings, rows = measure(parts, model, prompts, f"Evaluating {system}", journal)
    facts = {"label": label, "task": TASK, "settings": settings, "metrics": metrics, "header": header}
    folder.write_evaluation(system, facts, rows)


def bench_of(
    parts: Parts,
    folder: RunFolder,
    system: str,
    model: nn.Module,
    task: Probe,
    label: str,
    weights_of: Callable[[nn.Module], str],
) -> Bench:
    """One system of a run, ready for a task."""
    config = parts.config
    return Bench(
        system=system,
        model=model,
        teacher=None if model is parts.teacher else parts.comparable,
        tokenizer=parts.tokenizer,
        facts=parts.facts,
        vocab=parts.vocab,
        writer=config.engine.for_student(),
        data=config.data,
        sampling=parts.limited(config.evaluate.sampling),
        seeds=config.evaluate.seeds,
        held_out=config.evaluate.data or config.data.valid,
        limit=config.evaluate.limit,
        context=context_of(unwrap(model).config),
        batch_size=config.evaluate.batch_size,
        title=f"{task.title}: {label}",
        weights_of=weights_of,
        open_journal=lambda header, name: Journal(folder.partial(system, task.title, name), header),
    )


def evaluate_task(bench: Bench, task: Probe, folder: RunFolder, label: str) -> None:
    """Measure one system on one task and write the result, unless the very same result is there already."""
    header = content_digest(task.header(bench))
    if folder.has_evaluation(bench.system, task.title, header=header):
        return
    training = bench.model.training
    bench.model.eval()
    try:
        outcome = task.measure(bench)
    finally:
        bench.model.train(training)
    facts = {
        "label": label,
        "task": task.title,
        "settings": {"kind": task.kind, **outcome.settings},
        "metrics": outcome.metrics,
        "header": header,
    }
    folder.write_evaluation(bench.system, facts, outcome.rows, task.title)


def as_teacher(parts: Parts, translation: Translation) -> Parts:
    """The parts as the teacher sees them: its tokenizer, its end token, its ids."""
    tokenizer = translation.encoder.tokenizer
    return replace(
        parts, tokenizer=tokenizer, facts=translation.facts, vocab=len(tokenizer), translation=None
    )


def measure(
    parts: Parts,
    model: nn.Module,
    prompts: tuple[Prompt, ...],
    title: str | None,
    journal: Journal | None = None,
) -> tuple[dict[str, float], dict[str, Any], list[dict[str, Any]]]:
    """Metrics, the settings they were taken with, and one row for each answer."""
    config = parts.config.evaluate
    sampling = parts.limited(config.sampling)
    training = model.training
    model.eval()
    answers = answer(
        parts.engine(model), prompts, sampling, config.seeds, parts.tokenizer, title=title, journal=journal
    )
    metrics = {
        **answers.metrics,
        **closeness(
            model,
            None if model is parts.teacher else parts.comparable,
            prompts,
            answers.responses,
            pad_id=parts.facts.pad_id,
            vocab=parts.vocab,
            batch_size=config.batch_size,
        ),
        "parameters": parameter_counts(model)["parameters"],
    }
    model.train(training)
    settings = {
        "sampling": sampling.model_dump(mode="json"),
        "seeds": list(config.seeds),
        "prompts": len(prompts),
        "questions_digest": questions_digest(prompts),
        "rouge": "rouge-score rougeL F, stemmer, best over references",
        "loss": "nats per reference token",
        "fidelity": "on references; _on_own_text: on the student's own answers of the first seed",
    }
    return metrics, settings, answers.rows
