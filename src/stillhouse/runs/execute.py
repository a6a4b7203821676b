"""Runs a configuration from beginning to end and leaves a run folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillhouse import console
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Progress
from stillhouse.errors import TrainingError
from stillhouse.evaluate import generate_and_score, likelihood
from stillhouse.evaluate.likelihood import references_of
from stillhouse.rollouts.offline.curation import curation_totals
from stillhouse.runs.build import Parts, assemble, make_step
from stillhouse.runs.checks import check_context_lengths, preflight
from stillhouse.runs.config import RunConfig
from stillhouse.runs.evaluation import check_tasks, evaluate_system, held_out_prompts
from stillhouse.runs.export.weights import export, write_card
from stillhouse.runs.folder import RunFolder, check_space, default_folder, environment, recorded
from stillhouse.runs.resolve import Resolved, resolve
from stillhouse.runs.servers import report_server_usage
from stillhouse.runs.training_arguments import training_arguments
from stillhouse.train import checkpoints
from stillhouse.train.callbacks import Interrupt, MetricsLog, ProgressBar, Saver, Validation, last_row
from stillhouse.train.step import Step
from stillhouse.train.trainer import DistilTrainer, Ranks, steps_in_all, steps_in_epoch

logger = logging.getLogger("stillhouse")


@dataclass(frozen=True, slots=True)
class Result:
    """What a run has come to.

    Example: `Result(folder=Path("runs/kd"), state="done", metrics={"rouge_l": 57.1, ...})`
    """

    folder: Path
    state: str
    """"done", or "interrupted" after Ctrl-C."""
    metrics: dict[str, float]
    """The evaluation of the student after training; the last row of the log if nothing was evaluated."""


def run(source: str | Path | Mapping[str, Any], *, resume: bool = False, **overrides: Any) -> Result:
    """Distil as a YAML file or a dictionary says.

    Args:
        source: a YAML file, or the same as a dictionary.
        resume: continue the run in the folder from its newest complete checkpoint.
        **overrides: values that lie over those of the source: `train={"lr": 1e-4}`, or with a dotted name
            `**{"train.lr": 1e-4}`.

    Returns:
        The run folder and the metrics.

    Raises:
        StillhouseError: configuration, data, models or machine are not as needed; the message says what.

    Example:
        >>> result = stillhouse.run("run.yaml", train={"epochs": 2.0})
        >>> result.metrics["rouge_l"]
    """
    return execute(resolve(source, overrides), resume=resume)


def execute(resolved: Resolved, resume: bool = False) -> Result:
    """Run a configuration that has been checked."""
    config = resolved.config
    folder = RunFolder(default_folder(config))
    folder.check(resume)
    preflight(config)
    with console.phase("Loading models and data"):
        parts = assemble(config)
        questions = held_out_prompts(config, parts.data, parts.tokenizer)
        check_tasks(config, parts.tokenizer)
    check_context_lengths(config, parts.data.train, questions, parts.contexts)
    facts = parts.model_facts()
    check_space(folder.path, _bytes_needed(config, facts) - folder.size())
    changes = _changes(folder, resolved) if resume else []
    # Nothing has been written so far: what is refused above leaves no folder behind.
    with recorded(folder, config) as interrupt:
        folder.record_changes(changes)
        folder.write_text("resolved.yaml", resolved.yaml)
        folder.write("provenance.json", resolved.provenance)
        folder.write("environment.json", environment())
        folder.write("data.json", parts.data.report)
        folder.write("models.json", facts)
        if config.evaluate.before:
            evaluate_system(parts, questions, folder, "student before", parts.student)
        if config.evaluate.teacher and parts.teacher is not None:
            evaluate_system(parts, questions, folder, "teacher", parts.teacher)
        finished = train(parts, folder, interrupt, resume)
        if rounds := curation_totals(folder.responses):
            folder.write("data.json", {**parts.data.report, "curation": rounds})
        if finished:
            if folder.main:
                with console.phase("Saving the student", quiet=True):
                    export(parts, folder)
            evaluate_system(parts, questions, folder, "student after", parts.student)
            write_card(parts, folder)
        folder.end("done" if finished else "interrupted")
    if config.output.report and folder.main:
        _write_report(folder)
    return Result(folder.path, "done" if finished else "interrupted", _headline(folder))


def train(parts: Parts, folder: RunFolder, interrupt: Interrupt, resume: bool) -> bool:
    """Train the student in place.

    Args:
        parts: the loaded run.
        folder: where everything goes.
        interrupt: requests a stop after a step.
        resume: continue from the newest complete checkpoint.

    Returns:
        Whether it came to the end; False after Ctrl-C.
    """
    config, prompts = parts.config, len(parts.data.train)
    arguments = training_arguments(config, folder.checkpoints)
    per_epoch, in_all = steps_in_epoch(arguments, prompts), steps_in_all(arguments, prompts)
    step = make_step(parts, folder, Ranks(arguments.world_size, arguments.device))
    log = MetricsLog(folder.metrics, step)
    validation = _validation(parts, folder, step, log, per_epoch)
    saver = Saver(config.train, step, validation, folder.checkpoints, per_epoch)
    bar = ProgressBar(f"Training {config.name}", step)
    callbacks = [log, *([validation] if validation else []), saver, bar, interrupt]
    trainer = make_trainer(parts, step, arguments, callbacks)
    checkpoint = checkpoints.newest_whole(folder.checkpoints) if resume else None
    if checkpoint is not None:
        saved = checkpoints.load_state(checkpoint)
        step.load_state_dict(saved["step"])
        if validation is not None:
            validation.best = saved["best"]
    reached = -1 if checkpoint is None else checkpoints.step_of(checkpoint)
    if folder.main:
        checkpoints.drop_after(folder.checkpoints, reached)
        log.cut(after=reached)
    if checkpoint is not None and reached >= in_all:
        trainer._load_from_checkpoint(str(checkpoint))  # train() would do one step more
        return True
    folder.note(max_steps=in_all)
    if checkpoint is None and validation is not None:
        validation.now(Progress(0, in_all, 0.0, in_all / per_epoch), folder.main)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.close()
        for line in step.close():
            if folder.main:
                console.note(line)
        report_server_usage(parts.connected_engine, step.teachers.get(MAIN), folder)
    return not interrupt.requested or trainer.state.global_step >= trainer.state.max_steps


def make_trainer(parts: Parts, step: Step, arguments: Any, callbacks: list[Any]) -> DistilTrainer:
    """The trainer for a run, with Hugging Face's own printing and saving switched off where ours does it."""
    from transformers import PrinterCallback, ProgressCallback

    trainer = DistilTrainer(
        step=step,
        model=parts.student,
        args=arguments,
        train_dataset=list(parts.data.train),
        processing_class=parts.tokenizer,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.callback_handler.callbacks[1:1] = callbacks  # behind the one that drives the step
    return trainer


def _validation(
    parts: Parts, folder: RunFolder, step: Step, log: MetricsLog, steps_per_epoch: int
) -> Validation | None:
    config = parts.config
    held_out = parts.data.valid[: config.evaluate.valid_limit]
    if not held_out or config.train.validate_every == "never":
        return None
    engine = parts.engine(parts.student)
    sampling = parts.limited(config.evaluate.sampling)

    def measure() -> dict[str, float]:
        references = references_of(held_out)
        values = {
            "loss": likelihood(
                parts.student, references, parts.facts.pad_id, batch_size=config.evaluate.batch_size
            ).loss
        }
        if config.train.validate_rouge:
            seeds = config.evaluate.seeds[:1]
            scored = generate_and_score(engine, held_out, sampling, seeds, parts.tokenizer)
            values |= {
                name: scored.metrics[name]
                for name in ("rouge_l", "mean_length", "finished")
                if name in scored.metrics
            }
        return values

    def keep_best() -> None:
        fresh = folder.path / ".best.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        torch.save(parts.student.state_dict(), fresh / "weights.pt")
        checkpoints.replace_folder(fresh, folder.best)

    return Validation(config.train, step, log, measure, keep_best, steps_per_epoch)


def _changes(folder: RunFolder, resolved: Resolved) -> list[str]:
    """The values that differ from those that the run was started with, with a warning."""
    changes = folder.changes({path: fact["value"] for path, fact in resolved.provenance.items()})
    if changes:
        logger.warning("resumed with other values than the run was started with: %s", ", ".join(changes))
    return changes


def _write_report(folder: RunFolder) -> None:
    from stillhouse.report import write_report

    path = write_report([folder.path], folder.report)
    console.note(f"Report: {path}")


def _headline(folder: RunFolder) -> dict[str, float]:
    import json

    after = folder.path / "evaluation" / "student-after.json"
    if after.exists():
        metrics: dict[str, float] = json.loads(after.read_text(encoding="utf-8"))["metrics"]
        return metrics
    return {k: v for k, v in last_row(folder.metrics).items() if isinstance(v, int | float)}


def _bytes_needed(config: RunConfig, facts: dict[str, Any]) -> int:
    trainable, whole = facts["student"]["trainable"], facts["student"]["bytes"]
    checkpoint = whole + 8 * trainable
    return int((config.train.keep_checkpoints + 1) * checkpoint + 2 * whole)


__all__ = ["Result", "TrainingError", "execute", "make_trainer", "run", "train"]
