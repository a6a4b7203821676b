"""Evaluates models outside a run: one by itself, or a teacher and several students on the same tasks.

A comparison is a folder with one run folder for each student, each with the teacher's results beside the
student's own, so that everything that reads run folders reads it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.core.types import Prompt
from stillhouse.data import Data
from stillhouse.data.tokenise import Encoder
from stillhouse.engines import TokenizerInfo
from stillhouse.errors import ConfigError, Fault, ModelError
from stillhouse.evaluate.tasks import REGISTRY as TASKS
from stillhouse.files import atomic, locate
from stillhouse.models import (
    check_same_tokenizer,
    fingerprint,
    load_student,
    load_teacher,
    load_tokenizer,
    local_device,
)
from stillhouse.runs.build import Parts, assemble
from stillhouse.runs.config import RunConfig
from stillhouse.runs.evaluation import HELD_OUT_TASK, evaluate_prompts, evaluate_system, held_out_prompts
from stillhouse.runs.folder import RunFolder, check_writable, environment
from stillhouse.runs.preflight import check_room, preflight
from stillhouse.runs.recorded import recorded
from stillhouse.runs.resolve import Resolved, resolve

logger = logging.getLogger("stillhouse")

CARRIED = (
    "state.json", "resolved.yaml", "provenance.json", "environment.json", "data.json", "models.json",
    "metrics.jsonl",
)  # fmt: skip
"""What the folder of a student keeps of the run that made it."""


@dataclass(frozen=True, slots=True)
class Student:
    """A model to compare.

    Example: `Student("kd", model="runs/kd/student", run=Path("runs/kd"))`
    """

    label: str
    model: str
    run: Path | None
    """The run folder that it comes from, if there is one."""


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
    """Evaluate a model by itself.

    Returns:
        System, settings and metrics as the run folder has them, and one row for each answer.

    Raises:
        StillhouseError: the model, the teacher or the data cannot be used.
    """
    evaluate = {"sampling": sampling, "seeds": list(seeds), "limit": limit}
    config = resolve(_tree(model, teacher, template, str(data), evaluate)).config
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
    metrics, settings, rows = evaluate_prompts(parts, parts.student, prompts, title=f"Evaluating {model}")
    facts = {
        "system": model,
        "task": HELD_OUT_TASK,
        "data": str(data),
        "settings": settings,
        "metrics": metrics,
    }
    return facts, rows


def _tree(
    model: str, teacher: str | None, template: str, rows: str, evaluate: Mapping[str, Any]
) -> dict[str, Any]:
    """A run that only evaluates."""
    limit = evaluate.get("sampling", {}).get("max_tokens", 256)
    tree: dict[str, Any] = {
        "student": {"path": model, "dtype": "auto"},
        "data": {"train": rows, "template": template, "max_response": limit, "no_response": "drop"},
        "objective": "cross_entropy",
        "evaluate": dict(evaluate),
    }
    if teacher is not None:
        tree["teacher"] = {"kind": "live", "path": teacher}
    return tree


def compare(
    models: Sequence[str],
    folder: Path,
    *,
    teacher: str | None,
    template: str,
    data: Path | None,
    evaluate: Mapping[str, Any],
) -> list[Path]:
    """Evaluate a teacher and students on the same tasks; what is there already is not done again.

    Args:
        models: students: model folders, hub names, or run folders, of which the exported student is taken.
        folder: where the results go, in a run folder for each student.
        teacher: also evaluate this model, and measure how near the students are to it.
        template: "auto", "alpaca", "chat" or "plain", for tasks without a template of their own.
        data: held-out rows with references, for tasks without rows and for the usual measures.
        evaluate: as the `evaluate` part of a run: tasks, sampling, seeds, limit.

    Returns:
        The run folders.

    Raises:
        StillhouseError: a model, the data or a task cannot be used.
    """
    students = named(models, reserved={"teacher"} if teacher is not None else set())
    given = dict(evaluate) if data is None else {**evaluate, "data": str(data)}
    rows = _rows(given)
    check_writable("--output", folder)
    for student in students:
        _check_own(folder / student.label)
    resolved = {
        student.label: resolve(
            {**_tree(student.model, teacher, template, rows, given), "name": student.label}
        )
        for student in students
    }
    for one in resolved.values():
        preflight(one.config)
    if teacher is not None:
        own = RunFolder(folder / ".teacher")  # no report looks into a folder whose name begins with a dot
        alone = resolve({**_tree(teacher, None, template, rows, _of_teacher(given)), "name": "teacher"})
        parts = _loaded(alone.config)
        parts.teacher = parts.student
        evaluate_system(parts, _questions(parts), own, "teacher", parts.student)
        del parts
    for student in students:
        target = RunFolder(folder / student.label)
        if teacher is not None:
            _copy(own.path / "evaluation", target.path / "evaluation", "teacher*.json*")
        _evaluate(student, resolved[student.label], target)
    return [folder / student.label for student in students]


def _of_teacher(evaluate: Mapping[str, Any]) -> dict[str, Any]:
    """The same without tasks that compare a student with the teacher."""
    tasks = [task for task in evaluate.get("tasks", ()) if TASKS.parse(task).applies_to_teacher]
    return {**evaluate, "tasks": tasks}


def _evaluate(student: Student, resolved: Resolved, folder: RunFolder) -> None:
    """Measure one student; the files of the run that made it stand beside its results."""
    parts = _loaded(resolved.config)
    _set_aside(folder, fingerprint(parts.student))
    if student.run is not None:
        for name in CARRIED:
            _copy(student.run, folder.path, name)
        evaluate_system(parts, _questions(parts), folder, "student after", parts.student)
        return
    with recorded(folder, resolved.config):
        folder.write_text("resolved.yaml", resolved.yaml)
        folder.write("provenance.json", resolved.provenance)
        folder.write("environment.json", environment())
        folder.write("models.json", parts.model_facts())
        evaluate_system(parts, _questions(parts), folder, "student after", parts.student)
        folder.end("done")


def _set_aside(folder: RunFolder, weights: str) -> None:
    """Move results of other weights under the same name out of sight; of tasks not asked for now they would
    stay, and stand beside the new ones."""
    kept = folder.path / "weights.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else weights
    old = sorted((folder.path / "evaluation").glob("student-after*")) if before != weights else []
    if old:
        away = folder.path / f".evaluation-{before[:8]}"
        away.mkdir(exist_ok=True)
        for path in old:
            os.replace(path, away / path.name)
        logger.warning("%s: results of other weights are moved to %s", folder.path, away)
    folder.write(kept.name, weights)


def _copy(source: Path, target: Path, pattern: str) -> None:
    for path in sorted(source.glob(pattern)) if source.is_dir() else []:
        with atomic(target / path.name, "wb") as handle:
            handle.write(path.read_bytes())


def _loaded(config: RunConfig) -> Parts:
    """Models without the data of a training.

    A teacher of another tokenizer is left out: distances between distributions over other tokens say nothing.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(config.student)
    student = load_student(config.student, tokenizer, None, config.train.seed)
    where, teacher, vocab = (
        config.teacher.model_to_load() if config.teacher is not None else None,
        None,
        len(tokenizer),
    )
    if where is not None:
        try:
            vocab = check_same_tokenizer(tokenizer, load_tokenizer(where))
            teacher = load_teacher(where)
        except ModelError as error:
            logger.warning("%s: not compared with the teacher's distribution. %s", config.student.path, error)
    device = local_device()
    end = Encoder(config.data.template, tokenizer).end_id
    return Parts(
        config,
        tokenizer,
        TokenizerInfo(eos_ids=(end,), pad_id=tokenizer.pad_token_id),
        student.to(device),
        None if teacher is None else teacher.to(device),
        vocab,
        Data((), (), (), end),
    )


def _questions(parts: Parts) -> tuple[Prompt, ...]:
    if parts.config.evaluate.data is None:
        return ()
    found = held_out_prompts(parts.config, parts.data, parts.tokenizer)
    prompts = tuple(prompt for prompt in found if prompt.references)
    check_room(parts.config, prompts, prompts, parts.contexts)
    return prompts


def _check_own(folder: Path) -> None:
    """Refuse to write results over a run: there must be nothing that only a training leaves."""
    if any((folder / name).exists() for name in ("checkpoints", "student", "responses")):
        raise ConfigError(
            Fault("--output", f"{folder} is a run of its own", hint="Choose another folder for the results.")
        )


def named(models: Sequence[str], reserved: Collection[str] = ()) -> list[Student]:
    """Models with short names for folders and tables: that of the run, or of the model's folder.

    A name that is taken gets that of the folder around it in front, or else a number behind it.

    Args:
        models: folders, hub names or run folders.
        reserved: names that are taken already.

    Raises:
        ConfigError: a run folder holds no exported student.
    """
    students: list[Student] = []
    for model in models:
        place = locate(model)
        run = place if (place / "state.json").is_file() else place.parent
        is_run = (run / "state.json").is_file() and (run == place or place.name == "student")
        if is_run and not (run / "student" / "config.json").is_file() and run == place:
            raise ConfigError(
                Fault("MODEL", f"{model} is a run without a finished student", hint="Finish it: --resume.")
            )
        path = str(run / "student") if is_run and run == place else model
        label = _plain(run.name if is_run else place.name)
        taken = {student.label for student in students} | set(reserved)
        above = (run if is_run else place).absolute().parent.name
        names = (label, *([_plain(f"{above}-{label}")] if above else []))
        names += tuple(f"{label}-{number}" for number in range(2, len(models) + 3))
        label = next(name for name in names if name not in taken)
        students.append(Student(label, path, run if is_run else None))
    return students


def _plain(name: str) -> str:
    """A name for folders."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"


def _rows(evaluate: Mapping[str, Any]) -> str:
    """Some file of rows: a configuration must name one to train on, and nothing is trained."""
    if "data" in evaluate:
        return str(evaluate["data"])
    for task in evaluate.get("tasks", ()):
        data = task.get("data") if isinstance(task, Mapping) else None
        path = data.get("path") if isinstance(data, Mapping) else data
        if isinstance(path, str):
            return path
    return "package:stillhouse/demo/data/dev.jsonl"
