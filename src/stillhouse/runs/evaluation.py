"""Evaluates one system of a run, on held-out prompts and on tasks, into the run folder."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from stillhouse.core.distributed import (
    SINGLE_PROCESS,
    Ranks,
    broadcast_from_first,
    first_alone,
    rank_and_size,
)
from stillhouse.core.journal import Journal, content_digest
from stillhouse.core.types import Prompt
from stillhouse.data import Data, load_prompts
from stillhouse.data.templates import Template
from stillhouse.data.tokenise import Encoder
from stillhouse.evaluate import generate_and_score
from stillhouse.evaluate.generation import Share, questions_digest, token_ids_digest, with_sums
from stillhouse.evaluate.likelihood import likelihood_metrics
from stillhouse.evaluate.tasks import EvalContext, EvalTask, PromptTask, TaskResult
from stillhouse.models import fingerprint, parameter_counts, unwrap
from stillhouse.runs.build import Parts
from stillhouse.runs.checks import context_length
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.make_step import shared_results
from stillhouse.runs.tokenizers import Translation

EVALUATED = "eval"
"""The name of the rows of evaluate.data among the sets of a run."""
SET_FACTS = {
    "path": "data", "sha256": "sha256", "rows": "rows", "dropped": "dropped", "truncated": "truncated",
}  # fmt: skip
"""Field of the report on a set -> setting of a result."""
SHARED = ("teacher", "student before")
"""Systems that several runs may have in common."""
HELD_OUT_TASK = "held-out prompts"
"""The name of the evaluation on held-out prompts among the tasks of a report."""


def held_out_prompts(config: RunConfig, data: Data, tokenizer: Any) -> tuple[Prompt, ...]:
    """The prompts of evaluate.data, or else of data.valid."""
    if config.evaluate.data is None and config.data.train_on == "last":
        return tuple(data.valid[: config.evaluate.limit])
    encoder = (data.encoder or Encoder(config.data.template, tokenizer)).answering_last()
    dataset, name = config.evaluate.data, EVALUATED
    if dataset is None:
        if config.data.valid is None:
            return ()
        dataset, name = config.data.valid, "valid"
    loaded = load_prompts(name, dataset, config.data, encoder, needs={"responses"})
    if name == EVALUATED:
        data.report[EVALUATED] = loaded.report
    return tuple(loaded.prompts[: config.evaluate.limit])


def set_facts(data: Data, name: str) -> dict[str, Any]:
    """Where the rows of a set are from, their number and digest, how many were not used and how many cut."""
    sets = (*data.report.get("sets", ()), data.report.get(EVALUATED) or {})
    found = next((report for report in sets if report.get("name") == name), None)
    return {} if found is None else {SET_FACTS[key]: found[key] for key in SET_FACTS}


def check_tasks(config: RunConfig, tokenizer: Any) -> None:
    """Load the prompts of every task, so that their faults are reported before training.

    Raises:
        ConfigError: a task has no rows.
        DataError: its rows cannot be read, or none is left.
    """
    for task in config.evaluate.expanded_tasks():
        if isinstance(task, PromptTask):
            encoder = task.encoder(config.data.template, tokenizer)
            task.load(encoder, config.data, config.evaluate.data or config.data.valid)


def evaluate_system(
    parts: Parts, prompts: tuple[Prompt, ...], folder: RunFolder, system: str, model: nn.Module
) -> None:
    """Evaluate one system on the held-out prompts, then on the tasks.

    Results that are there already are not computed again, and an interrupted evaluation resumes.

    Args:
        parts: a loaded run.
        prompts: what `held_out_prompts` returned; none: only the tasks.
        folder: where the results go.
        system: "teacher", "student before" or "student after".
        model: whose weights to use.
    """
    translation = parts.translation
    if model is parts.teacher and translation is not None:
        parts, prompts = _with_tokenizer_of_teacher(parts, translation), translation.prompts(prompts)
    evaluation = _SystemEvaluation(parts, folder, system, model)
    if prompts:
        evaluation.on_held_out(prompts)
    for task in parts.config.evaluate.expanded_tasks():
        if task.applies_to_teacher or model is not parts.teacher:
            evaluation.on_task(task)


def _with_tokenizer_of_teacher(parts: Parts, translation: Translation) -> Parts:
    tokenizer, template = translation.encoder.tokenizer, translation.encoder.template
    config = parts.config
    students: Template = config.data.template
    if template != students.resolved(tokenizer):
        data = config.data.model_copy(update={"template": template, "teacher_template": None})
        config = config.model_copy(update={"data": data})
    return replace(
        parts,
        config=config,
        tokenizer=tokenizer,
        facts=translation.facts,
        vocab=len(tokenizer),
        translation=None,
    )


class _SystemEvaluation:
    """Evaluates one system and writes the results that are not there yet."""

    def __init__(self, parts: Parts, folder: RunFolder, system: str, model: nn.Module) -> None:
        self.parts, self.folder, self.system, self.model = parts, folder, system, model
        self.label = parts.config.name if system == "student after" else system
        self.fingerprint = functools.cache(fingerprint)  # no weights change meanwhile
        self.shared = None
        self.world = Ranks(*rank_and_size())
        if system in SHARED and self.world.size == 1:
            self.shared = shared_results(parts, evaluate=parts.config.evaluate.model_dump(mode="json"))

    def on_held_out(self, prompts: tuple[Prompt, ...]) -> None:
        """Evaluate on the held-out prompts."""
        config = self.parts.config.evaluate
        generation = {
            "prompts": token_ids_digest(prompts),
            "sampling": self.parts.limited(config.sampling).model_dump(mode="json"),
            "weights": self.fingerprint(self.model),
        }
        model = self.parts.whole_teacher
        teacher = None if model is None else self.fingerprint(model)
        header = content_digest({**generation, "seeds": config.seeds, "teacher": teacher})
        if self._has(header):
            return
        with self._once(header, questions_digest(prompts)) as there:
            if not there:
                self._held_out(prompts, generation, header)

    def _held_out(self, prompts: tuple[Prompt, ...], generation: dict[str, Any], header: str) -> None:
        journal = Journal(self.folder.partial(self.system), generation)
        metrics, settings, rows = evaluate_prompts(
            self.parts, self.model, prompts, f"Evaluating {self.system}", journal
        )
        facts = {"label": self.label, "task": HELD_OUT_TASK, "settings": settings, "metrics": metrics}
        self.folder.write_evaluation(self.system, {**facts, "header": header}, rows)

    def on_task(self, task: EvalTask) -> None:
        """Evaluate on one task."""
        context = self._context(task)
        header = content_digest(task.dependencies(context))
        if self._has(header, task.title):
            return
        with self._once(header, "", task.title) as there:
            if not there:
                self._task(task, context, header)

    @contextlib.contextmanager
    def _once(self, header: str, questions: str, task: str | None = None) -> Iterator[bool]:
        """Whether another run's result was taken; else what the block writes is there for the others."""
        if self.shared is None:
            yield False
            return
        path = self.folder.evaluation(self.system, task)
        key = {"system": self.system, "task": task, "header": header, "questions": questions}
        with self.shared.once(path.stem, key, [path.with_suffix(".jsonl"), path]) as there:
            yield there

    def _has(self, header: str, task: str | None = None) -> bool:
        """Whether the first process finds the result."""

        def there() -> bool:
            return self.folder.has_evaluation(self.system, *([task] if task else []), header=header)

        return broadcast_from_first(self.world.rank, self.world.size, there)

    def _task(self, task: EvalTask, context: EvalContext, header: str) -> None:
        training = self.model.training
        self.model.eval()
        try:
            result = self._measured(task, context)
        finally:
            self.model.train(training)
        facts = {
            "label": self.label,
            "task": task.title,
            "settings": {"kind": task.kind, **result.settings},
            "metrics": result.metrics,
            "header": header,
        }
        self.folder.write_evaluation(self.system, facts, result.rows, task.title)

    def _measured(self, task: EvalTask, context: EvalContext) -> TaskResult:
        if not task.measures_time:
            return task.evaluate(context)
        return first_alone(functools.partial(task.evaluate, replace(context, world=SINGLE_PROCESS)))

    def _context(self, task: EvalTask) -> EvalContext:
        parts, config = self.parts, self.parts.config
        return EvalContext(
            system=self.system,
            model=self.model,
            teacher=None if self.model is parts.teacher else parts.comparable,
            tokenizer=parts.tokenizer,
            tokenizer_info=parts.facts,
            vocab_size=parts.vocab,
            engine=config.engine.for_student(),
            data=config.data,
            sampling=parts.limited(config.evaluate.sampling),
            seeds=config.evaluate.seeds,
            held_out=config.evaluate.data or config.data.valid,
            limit=config.evaluate.limit,
            context_length=context_length(unwrap(self.model).config),
            batch_size=config.evaluate.batch_size,
            title=f"{task.title}: {self.label}",
            fingerprint=self.fingerprint,
            open_journal=lambda header, name: Journal(
                self.folder.partial(self.system, task.title, name), header
            ),
            world=self.world,
        )


def evaluate_prompts(
    parts: Parts,
    model: nn.Module,
    prompts: tuple[Prompt, ...],
    title: str | None,
    journal: Journal | None = None,
    rows_of: str | None = None,
) -> tuple[dict[str, float], dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a model on prompts with references.

    Args:
        parts: a loaded run.
        model: whose weights to use.
        prompts: those without references are left out.
        title: show progress under this title.
        journal: what an interrupted evaluation has generated.
        rows_of: the name of the set that the prompts are from; default: that of `held_out_prompts`.

    Returns:
        Metrics, the settings they depend on, and one row for each response.
    """
    config = parts.config.evaluate
    sampling = parts.limited(config.sampling)
    training = model.training
    model.eval()
    world = Ranks(*rank_and_size())
    scored = generate_and_score(
        parts.engine(model),
        prompts,
        sampling,
        config.seeds,
        parts.tokenizer,
        title=title,
        journal=journal,
        share=Share.of(world, model),
    )
    likelihoods, sums = likelihood_metrics(
        model,
        None if model is parts.teacher else parts.comparable,
        prompts,
        scored.responses,
        pad_id=parts.facts.pad_id,
        vocab_size=parts.vocab,
        batch_size=config.batch_size,
        world=world,
    )
    parameters = parameter_counts(model)["parameters"]
    metrics = {**scored.metrics, **likelihoods, "parameters": parameters}
    model.train(training)
    settings = {
        "sampling": sampling.model_dump(mode="json"),
        "seeds": list(config.seeds),
        "prompts": len(prompts),
        "questions_digest": questions_digest(prompts),
        **set_facts(parts.data, rows_of or ("valid" if config.data is None else EVALUATED)),
        "rouge": "rouge-score rougeL F, stemmer, best over references",
        "loss": "nats per reference token",
        "fidelity": "on references; _on_own_text: on the student's own responses of the first seed",
    }
    return metrics, settings, with_sums(scored.rows, sums)
