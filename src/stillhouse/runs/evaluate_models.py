"""Evaluates models outside a run: one alone, or a teacher and several students on the same tasks.

Several give a folder with a run folder for each student, which also has the teacher's results, so that
everything that reads run folders reads them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.core.images import with_expander
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Prompt
from stillhouse.data import Data
from stillhouse.data.tokenise import Encoder
from stillhouse.engines import TokenizerInfo
from stillhouse.errors import ConfigError, Fault, ModelError
from stillhouse.evaluate.tasks import REGISTRY as TASKS
from stillhouse.files import atomic, check_writable, copy_images, locate
from stillhouse.models import (
    check_same_tokenizer,
    fingerprint,
    generation_ends,
    load_student,
    load_teacher,
    load_tokenizer,
    local_device,
    model_reader,
)
from stillhouse.models.paths import has_student
from stillhouse.runs.build import Parts, assemble, pack_where_possible
from stillhouse.runs.checks import check_context_lengths, preflight
from stillhouse.runs.config import RunConfig
from stillhouse.runs.evaluation import HELD_OUT_TASK, evaluate_prompts, evaluate_system, held_out_prompts
from stillhouse.runs.folder import RunFolder, environment
from stillhouse.runs.own_settings import OwnSettings, own_settings
from stillhouse.runs.recording import recorded
from stillhouse.runs.resolve import Resolved, resolve

logger = logging.getLogger("stillhouse")

TemplateChoice = str | Mapping[str, Any] | None
DEFAULT_SAMPLING: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 256}
"""Of models that come from no run."""
RUN_FILES = (
    "state.json", "resolved.yaml", "provenance.json", "environment.json", "data.json", "models.json",
    "metrics.jsonl",
)  # fmt: skip
"""Files of the run that made a student, copied next to its results."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model with its name in tables and its folder of results.

    Example: `NamedModel("kd", model="runs/kd/student", run=Path("runs/kd"))`
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
    template: TemplateChoice,
    evaluate: Mapping[str, Any],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate one model.

    Args:
        model: a model folder, a hub name, a run folder or its student's folder.
        data: held-out rows with references.
        teacher: compared with, where it has the same tokenizer.
        template: see `evaluate_models`.
        evaluate: see `evaluate_models`, without tasks.

    Returns:
        System, settings and metrics as in a run folder, and one row for each response.

    Raises:
        StillhouseError: the model, the teacher or the data cannot be used.
    """
    config = resolve(_tree(model, teacher, template, str(data), evaluate)).config
    preflight(config)
    parts = assemble(config)
    if parts.translator is not None:
        raise ModelError(
            f"--teacher: {teacher} has another tokenizer than {model}. KL and agreement compare token with "
            "token; evaluate the two separately, or choose a teacher with the same tokenizer."
        )
    prompts = tuple(prompt for prompt in parts.data.train if prompt.references)[: config.evaluate.limit]
    check_context_lengths(config, prompts, prompts, parts.contexts)
    metrics, settings, rows = evaluate_prompts(
        parts, parts.student, prompts, title=f"Evaluating {model}", rows_of="train"
    )
    facts = {
        "system": model,
        "task": HELD_OUT_TASK,
        "data": str(data),
        "settings": settings,
        "metrics": metrics,
    }
    return facts, rows


def _tree(
    model: str,
    teacher: str | None,
    template: TemplateChoice,
    rows: str,
    evaluate: Mapping[str, Any],
    shared: OwnSettings | None = None,
) -> dict[str, Any]:
    """The configuration of a run that only evaluates: what is asked for, else as the model's own run did."""
    own = own_settings(model)
    own = own if own.data or shared is None else shared
    asked = evaluate.get("sampling") or {}
    sampling = {**DEFAULT_SAMPLING, **own.evaluate.get("sampling", {}), **asked}
    limit = sampling["max_tokens"] if "max_tokens" in asked else own.data.get("max_response", 256)
    data = {**own.data, "train": rows, "max_response": limit, "no_response": "drop"}
    data["template"] = template or own.data.get("template", "auto")
    tree: dict[str, Any] = {
        "student": {"path": model, "dtype": "auto"},
        "data": data,
        "objective": "cross_entropy",
        "evaluate": {**own.evaluate, **evaluate, "sampling": sampling},
    }
    if teacher is not None:
        tree["teacher"] = {"kind": "live", "path": teacher}
    return tree


def evaluate_models(
    models: Sequence[str],
    folder: Path,
    *,
    teacher: str | None,
    template: TemplateChoice,
    data: Path | None,
    evaluate: Mapping[str, Any],
) -> list[Path]:
    """Evaluate a teacher and students on the same tasks, except what is up to date in the folder.

    Args:
        models: students: model folders, hub names, or run folders with an exported student.
        folder: for the results, with a run folder for each student.
        teacher: also evaluated, and compared with the students' distributions.
        template: a name, or a template with its options, for tasks without one of their own. None: that of
            the run that made the model (a teacher gets what all students share), "auto" for other models.
        data: held-out rows with references, for the standard metrics and for tasks without rows of their own.
        evaluate: as the `evaluate` section of a run: tasks, sampling, seeds, limit. What it does not set is
            as in the run that made the model; of others, sampling is greedy.

    Returns:
        The run folders.

    Raises:
        StillhouseError: a model, the data or a task cannot be used.
    """
    students = name_models(models, reserved={"teacher"} if teacher is not None else set())
    settings = dict(evaluate) if data is None else {**evaluate, "data": str(data)}
    rows = _any_rows(settings)
    check_writable("--output", folder)
    for student in students:
        _check_no_run(folder / student.label)
    resolved = {
        student.label: resolve(
            {**_tree(student.model, teacher, template, rows, settings), "name": student.label}
        )
        for student in students
    }
    for one in resolved.values():
        preflight(one.config)
    if teacher is not None:
        teacher_folder = RunFolder(folder / ".teacher")  # reports skip folders whose name starts with a dot
        tree = _tree(teacher, None, template, rows, _teacher_tasks(settings), _shared(students))
        teacher_only = resolve({**tree, "name": "teacher"})
        parts = load_models(teacher_only.config)
        parts.teachers = {MAIN: parts.student}
        evaluate_system(parts, scored_prompts(parts), teacher_folder, "teacher", parts.student)
        del parts
    for student in students:
        target = RunFolder(folder / student.label)
        if teacher is not None and target.main:
            _copy(teacher_folder.path / "evaluation", target.path / "evaluation", "teacher*.json*")
            copy_images(teacher_folder.path / "evaluation", target.path / "evaluation")
        _evaluate(student, resolved[student.label], target)
    return [folder / student.label for student in students]


def _shared(students: Sequence[NamedModel]) -> OwnSettings:
    """The settings that the runs of all students have in common; none where they differ."""
    found = [own_settings(student.model) for student in students]
    return found[0] if all(one == found[0] for one in found) else OwnSettings()


def _teacher_tasks(evaluate: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without tasks that compare a student with the teacher."""
    tasks = [task for task in evaluate.get("tasks", ()) if TASKS.parse(task).applies_to_teacher]
    return {**evaluate, "tasks": tasks}


def _evaluate(student: NamedModel, resolved: Resolved, folder: RunFolder) -> None:
    """Evaluate one student, with the files of the run that made it next to the results."""
    parts = load_models(resolved.config)
    if folder.main:
        _move_stale_results(folder, fingerprint(parts.student))
    if student.run is not None:
        for name in RUN_FILES if folder.main else ():
            _copy(student.run, folder.path, name)
        evaluate_system(parts, scored_prompts(parts), folder, "student after", parts.student)
        return
    with recorded(folder, resolved.config.name, resolved.config.recipe):
        folder.write_text("resolved.yaml", resolved.yaml)
        folder.write("provenance.json", resolved.provenance)
        folder.write("environment.json", environment())
        folder.write("models.json", parts.model_facts())
        evaluate_system(parts, scored_prompts(parts), folder, "student after", parts.student)
        folder.end("done")


def _weights_of(kept: Path) -> str:
    """The digest of the weights that were evaluated; of a damaged file one that no weights have."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        if isinstance(found, str) and found.isalnum():
            return found
    return "unknown"


def _move_stale_results(folder: RunFolder, weights: str) -> None:
    """Move results of other weights under the same name away: those of tasks that are not evaluated now would
    stay next to the new ones."""
    kept = folder.path / "weights.json"
    before = _weights_of(kept) if kept.is_file() else weights
    old = sorted((folder.path / "evaluation").glob("student-after*")) if before != weights else []
    if old:
        away = folder.path / f".evaluation-{before[:8]}"
        away.mkdir(exist_ok=True)
        for path in old:
            os.replace(path, away / path.name)
        copy_images(folder.path / "evaluation", away)
        logger.warning("%s: results of other weights were moved to %s", folder.path, away)
    folder.write(kept.name, weights)


def _copy(source: Path, target: Path, pattern: str) -> None:
    for path in sorted(source.glob(pattern)) if source.is_dir() else []:
        with atomic(target / path.name, "wb") as handle:
            handle.write(path.read_bytes())


def load_models(config: RunConfig) -> Parts:
    """Models without training data.

    A teacher with another tokenizer is left out: its distributions are over other tokens.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = with_expander(load_tokenizer(config.student), model_reader(config.student))
    student = load_student(config.student, tokenizer, None, config.train.seed)
    teacher_model = config.teacher.model_to_load() if config.teacher is not None else None
    teacher, vocab = None, len(tokenizer)
    if teacher_model is not None:
        try:
            vocab = check_same_tokenizer(tokenizer, load_tokenizer(teacher_model))
            teacher = load_teacher(teacher_model)
        except ModelError as error:
            logger.warning("%s: not compared with the teacher's distribution. %s", config.student.path, error)
    device = local_device()
    encoder = Encoder(config.data.template, tokenizer)
    ends = generation_ends(config.student, tokenizer)
    parts = Parts(
        config,
        tokenizer,
        TokenizerInfo(ends, tokenizer.pad_token_id, tokenizer).ended_by(encoder.ends),
        student.to(device),
        {} if teacher is None else {MAIN: teacher.to(device)},
        vocab,
        Data((), (), (), encoder.end_id),
    )
    pack_where_possible(parts)
    return parts


def scored_prompts(parts: Parts) -> tuple[Prompt, ...]:
    """The rows of `evaluate.data` that have references."""
    if parts.config.evaluate.data is None:
        return ()
    found = held_out_prompts(parts.config, parts.data, parts.tokenizer)
    prompts = tuple(prompt for prompt in found if prompt.references)
    check_context_lengths(parts.config, prompts, prompts, parts.contexts)
    return prompts


def _check_no_run(folder: Path) -> None:
    """Refuse to write results into a run folder, which has what only training leaves."""
    if any((folder / name).exists() for name in ("checkpoints", "student", "responses")):
        raise ConfigError(
            Fault("--output", f"{folder} is a training run", hint="Choose another folder for the results.")
        )


def name_models(models: Sequence[str], reserved: Collection[str] = ()) -> list[NamedModel]:
    """Give models short names for folders and tables: that of the run, or of the model's folder.

    A name that is taken gets the parent folder's as a prefix, or else a number as a suffix.

    Args:
        models: folders, hub names or run folders.
        reserved: names that are taken already.

    Raises:
        ConfigError: a run folder holds no exported student.
    """
    students: list[NamedModel] = []
    for model in models:
        place = locate(model)
        run = place if (place / "state.json").is_file() else place.parent
        is_run = (run / "state.json").is_file() and (run == place or place.name == "student")
        if is_run and run == place and not has_student(run):
            raise ConfigError(
                Fault("MODEL", f"{model} is a run without a finished student", hint="Finish it: --resume.")
            )
        path = str(run / "student") if is_run and run == place else model
        label = _folder_name(run.name if is_run else place.name)
        taken = {student.label for student in students} | set(reserved)
        above = (run if is_run else place).absolute().parent.name
        names = (label, *([_folder_name(f"{above}-{label}")] if above else []))
        names += tuple(f"{label}-{number}" for number in range(2, len(models) + 3))
        label = next(name for name in names if name not in taken)
        students.append(NamedModel(label, path, run if is_run else None))
    return students


def _folder_name(name: str) -> str:
    """The name with everything that folder names do not allow replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"


def _any_rows(evaluate: Mapping[str, Any]) -> str:
    """Some file of rows: a configuration needs data.train, even where nothing is trained."""
    if "data" in evaluate:
        return str(evaluate["data"])
    for task in evaluate.get("tasks", ()):
        data = task.get("data") if isinstance(task, Mapping) else None
        path = data.get("path") if isinstance(data, Mapping) else data
        if isinstance(path, str):
            return path
    return "package:stillhouse/demo/data/dev.jsonl"
