"""Runs a configuration from beginning to end and leaves a run folder."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from stillhouse import console, signals
from stillhouse.console.format import setting_text
from stillhouse.core.distributed import Ranks
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Progress, Prompt
from stillhouse.errors import ModelError, TrainingError
from stillhouse.evaluate import generate_and_score, likelihood
from stillhouse.evaluate.generation import Share
from stillhouse.evaluate.likelihood import references_of
from stillhouse.models import image_reader
from stillhouse.models.adapters import save_state
from stillhouse.models.quantise import is_quantised
from stillhouse.models.sharding import TrainedStudent
from stillhouse.report.history import with_history
from stillhouse.rollouts.offline.curation import curation_totals
from stillhouse.runs import history
from stillhouse.runs.build import Parts, assemble
from stillhouse.runs.checks import check_context_lengths, check_length, preflight
from stillhouse.runs.config import RunConfig
from stillhouse.runs.evaluation import check_tasks, evaluate_system, held_out_prompts
from stillhouse.runs.export.weights import export, write_card
from stillhouse.runs.folder import RunFolder, check_space, default_folder, environment
from stillhouse.runs.inputs import FILE as INPUTS
from stillhouse.runs.inputs import check_inputs, input_digests, parent_of
from stillhouse.runs.make_step import make_step
from stillhouse.runs.pruning import FILE as PRUNING
from stillhouse.runs.pruning import describe_pruning
from stillhouse.runs.recording import recorded
from stillhouse.runs.resolve import Resolved
from stillhouse.runs.result import Result, headline
from stillhouse.runs.same_values import check_same_rows, check_same_values
from stillhouse.runs.servers import report_server_usage
from stillhouse.runs.training_arguments import training_arguments
from stillhouse.train import checkpoints
from stillhouse.train.callbacks import MetricsLog, ProgressBar, Saver, StopOnSignal, Validation
from stillhouse.train.interrupt import Interrupt
from stillhouse.train.parallelism import shards_weights
from stillhouse.train.step import Step
from stillhouse.train.trainer import StepTrainer, steps_in_all, steps_in_epoch

logger = logging.getLogger("stillhouse")


def execute(resolved: Resolved, resume: bool = False) -> Result:
    """Run a configuration that has been checked."""
    config = resolved.config
    folder = RunFolder(default_folder(config))
    with folder.alone("--resume" if resume else "output.folder"):
        folder.check(resume)
        changes = _changes(folder, resolved) if resume else {}
        preflight(config)
        check_same_values(config)
        for note in resolved.notes:
            logger.warning(note)
        with console.phase("Loading models and data"):
            parts = assemble(config, folder.read(PRUNING) if resume else None)
            check_same_rows(parts)
            _check_trainable(parts)
            questions = held_out_prompts(config, parts.data, parts.tokenizer)
            check_tasks(config, parts.tokenizer)
        if parts.pruning is not None and folder.main:
            console.note(f"The student starts as the teacher with {describe_pruning(parts.pruning)}")
        check_context_lengths(config, parts.data.train, questions, parts.contexts)
        for note in check_length(config, len(parts.data.train)):
            logger.warning(note)
        found = _inputs(parts, folder, changes, resume)
        checkpoint = checkpoints.newest_whole(folder.checkpoints) if resume else None
        reached = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
        steps = steps_in_all(_arguments(parts, folder), len(parts.data.train))
        history.check_length(folder.path, reached, steps)
        check_space(folder.path, _bytes_needed(config, parts.model_facts()) - folder.size())
        # Nothing has been written so far: what is refused above leaves no folder behind.
        with recorded(folder, config.name, config.recipe, reached, changes) as interrupt:
            _write_facts(parts, folder, resolved, found)
            finished = _train_and_evaluate(parts, questions, folder, interrupt, checkpoint)
            folder.end("done" if finished else "interrupted", None if finished else _stopped(interrupt))
        if config.output.report and folder.main:
            _write_report(folder)
    by = None if interrupt.by is None or finished else interrupt.by.signal
    return Result(folder.path, "done" if finished else "interrupted", headline(folder), by)


def _check_trainable(parts: Parts) -> None:
    """Refuse a student that was quantised before: it can be evaluated, and not trained."""
    student = parts.config.student
    if student.quantise is None and is_quantised(parts.student):
        raise ModelError(
            f"student.path: {student.path} is quantised, and such weights cannot be trained. Name the model "
            "that it was made from, with student.quantise to train it as a quantised one."
        )


def _train_and_evaluate(
    parts: Parts,
    questions: tuple[Prompt, ...],
    folder: RunFolder,
    interrupt: Interrupt,
    checkpoint: Path | None,
) -> bool:
    """Everything between the first and the last word of a run; whether it came to its end."""
    config = parts.config
    if config.evaluate.before:
        evaluate_system(parts, questions, folder, "student before", parts.student)
    if config.evaluate.teacher and parts.teacher is not None:
        evaluate_system(parts, questions, folder, "teacher", parts.teacher)
    finished = train(parts, folder, interrupt, checkpoint)
    if rounds := curation_totals(folder.responses):
        folder.write("data.json", {**parts.data.report, "curation": rounds})
    if not finished:
        return False
    usage = None
    if folder.main:
        with console.phase("Saving the student", quiet=True):
            usage = export(parts, folder)
    evaluate_system(parts, questions, folder, "student after", parts.student)
    if folder.main:
        write_card(parts, folder, usage)
    return True


def train(parts: Parts, folder: RunFolder, interrupt: Interrupt, checkpoint: Path | None) -> bool:
    """Train the student in place.

    Args:
        parts: the loaded run.
        folder: where everything goes.
        interrupt: requests a stop after a step.
        checkpoint: continue from there; None: from the beginning.

    Returns:
        Whether it came to the end; False after a signal.
    """
    config, prompts = parts.config, len(parts.data.train)
    arguments = _arguments(parts, folder)
    per_epoch, in_all = steps_in_epoch(arguments, prompts), steps_in_all(arguments, prompts)
    step = make_step(parts, folder, Ranks.of(arguments))
    log = MetricsLog(folder.metrics, step)
    student = TrainedStudent(parts.student, shards_weights(arguments))
    validation = _validation(parts, folder, step, log, student, per_epoch)
    saver = Saver(config.train, step, validation, folder.checkpoints, per_epoch)
    bar = ProgressBar(f"Training {config.name}", step)
    callbacks = [log, *([validation] if validation else []), saver, bar, StopOnSignal(interrupt)]
    trainer = make_trainer(parts, step, student, arguments, callbacks)
    if validation is not None:
        validation.report = trainer.report
    if checkpoint is not None:
        saved = trainer.load_step(checkpoint)
        if validation is not None:
            validation.best = saved["best"]
    reached = -1 if checkpoint is None else checkpoints.step_of(checkpoint)
    if folder.main:
        checkpoints.drop_after(folder.checkpoints, reached)
        log.cut(after=reached)
    folder.note(max_steps=in_all)
    if checkpoint is not None and reached >= in_all:
        trainer._load_from_checkpoint(str(checkpoint))  # train() would do one step more
        return True
    if checkpoint is None and validation is not None:
        validation.now(Progress(0, in_all, 0.0, in_all / per_epoch), folder.main)
    try:
        with interrupt.waits_for(step):
            _train_until_stopped(trainer, interrupt, checkpoint)
    finally:
        trainer.driver.release()
        bar.close()
        for line in step.close():
            if folder.main:
                console.note(line)
        report_server_usage(parts.connected_engine, step.teachers.get(MAIN), folder)
    finished = not interrupt.requested or trainer.state.global_step >= trainer.state.max_steps
    if finished:
        student.gather()  # what is evaluated and exported is whole
    if finished and folder.main:
        _tell_unmoved(step, folder)
    return finished


def _tell_unmoved(step: Step, folder: RunFolder) -> None:
    """Say which schedules never left their start, and keep it in the record."""
    unmoved = step.schedules.unmoved()
    folder.note(unmoved=unmoved)
    for path, value in unmoved.items():
        logger.warning("%s stayed at its start, %g: what it follows never asked for more", path, value)


def _train_until_stopped(trainer: StepTrainer, interrupt: Interrupt, checkpoint: Path | None) -> None:
    """Train; if a signal breaks a step off, save the one before, unless there is none to save."""
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except signals.Stopped:
        if not interrupt.give_up_step():
            raise
        trainer.save_given_up_step()


def _arguments(parts: Parts, folder: RunFolder) -> Any:
    name, more = "ddp_find_unused_parameters", {}
    if name not in parts.config.train.hf:  # looking for unused weights costs a pass over the graph a step
        more[name] = _may_leave_weights_unused(parts.student)
    return training_arguments(parts.config, folder.checkpoints, more=more)


def _may_leave_weights_unused(student: nn.Module) -> bool:
    """Whether one process may have no use for weights that others use: a vision tower where all its rows are
    of text alone, experts that none of its tokens is sent to."""
    experts = any("expert" in name for name, _ in student.named_modules())
    return experts or image_reader(student) is not None


def make_trainer(
    parts: Parts, step: Step, student: TrainedStudent, arguments: Any, callbacks: list[Any]
) -> StepTrainer:
    """The trainer for a run, with Hugging Face's own printing and saving switched off where ours does it."""
    from transformers import PrinterCallback, ProgressCallback

    trainer = StepTrainer(
        step=step,
        model=student,
        args=arguments,
        train_dataset=parts.data.train,
        processing_class=parts.tokenizer,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.callback_handler.callbacks[1:1] = callbacks  # behind the one that drives the step
    return trainer


def _validation(
    parts: Parts,
    folder: RunFolder,
    step: Step,
    log: MetricsLog,
    student: TrainedStudent,
    steps_per_epoch: int,
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
                parts.student,
                references,
                parts.facts.pad_id,
                vocab_size=parts.vocab,
                batch_size=config.evaluate.batch_size,
                world=step.world,
            ).loss
        }
        if config.train.validate_rouge:
            seeds = config.evaluate.seeds[:1]
            scored = generate_and_score(
                engine,
                held_out,
                sampling,
                seeds,
                parts.tokenizer,
                share=Share.of(step.world, parts.student),
            )
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
        save_state(parts.student, fresh / "weights.pt")
        checkpoints.replace_folder(fresh, folder.best)

    return Validation(config.train, step, log, measure, keep_best, steps_per_epoch, student.gathered)


def _changes(folder: RunFolder, resolved: Resolved) -> history.Changes:
    """The values that differ from those that the run went on with last, with a warning.

    Raises:
        ConfigError: a run in its state does not take them over.
    """
    changes = history.changed_values(folder.facts("provenance.json"), resolved.provenance)
    history.check_changes(changes, folder.path, folder.saved_state().get("state") == "done")
    if changes:
        told = ", ".join(
            f"{path} ({setting_text(old)} -> {setting_text(new)})" for path, (old, new) in changes.items()
        )
        logger.warning("resumed with other values than before: %s", told)
    before, now = folder.read("environment.json"), environment()
    return changes | {
        f"environment.{name}": [before.get(name), value]
        for name, value in now.items()
        if before and before.get(name) != value
    }


def _inputs(parts: Parts, folder: RunFolder, changes: history.Changes, resume: bool) -> dict[str, Any]:
    """What the run is made of, by digest; on a resumption compared with what it was started with."""
    if not folder.main:
        return {}
    found = input_digests(parts)
    if resume:
        check_inputs(folder.facts(INPUTS), found, folder.path, changes)
    return found


def _write_facts(parts: Parts, folder: RunFolder, resolved: Resolved, found: dict[str, Any]) -> None:
    """What the run is, as it starts or goes on."""
    state = folder.saved_state()
    if "parent" not in state:
        student = found.get("student", {})
        folder.note(parent=parent_of(student.get("path"), student.get("digest")))
    folder.write_text("resolved.yaml", with_history(resolved.yaml, folder.saved_state()))
    folder.write("provenance.json", resolved.provenance)
    folder.write("environment.json", environment())
    folder.write("data.json", parts.data.report)
    folder.write("models.json", parts.model_facts())
    if parts.pruning is not None:
        folder.write(PRUNING, parts.pruning)
    folder.write(INPUTS, found)


def _stopped(interrupt: Interrupt) -> str:
    return f"stopped by {signals.name_of(interrupt.by or KeyboardInterrupt())}"


def _write_report(folder: RunFolder) -> None:
    from stillhouse.report import write_report

    path = write_report([folder.path], folder.report)
    console.note(f"Report: {path}")


def _bytes_needed(config: RunConfig, facts: dict[str, Any]) -> int:
    trainable, whole = facts["student"]["trainable"], facts["student"]["bytes"]
    checkpoint = whole + 8 * trainable
    return int((config.train.keep_checkpoints + 1) * checkpoint + 2 * whole)


__all__ = ["TrainingError", "execute", "make_trainer", "train"]
