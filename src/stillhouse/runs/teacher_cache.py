"""Fills the caches of a run's teachers before training; measures how each codec biases loss and gradient."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stillhouse import console
from stillhouse.config import nearest
from stillhouse.core.batch import TokenBatch
from stillhouse.core.distributed import rank_and_size
from stillhouse.core.requirements import MAIN, teacher_path
from stillhouse.core.types import Progress, Response
from stillhouse.data.collate import collate, read_by_teacher
from stillhouse.errors import ConfigError, Fault
from stillhouse.models import local_device
from stillhouse.objectives import Objective
from stillhouse.runs.build import Parts, assemble
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder, default_folder
from stillhouse.runs.make_step import make_context, make_step
from stillhouse.teachers import AnyTeacher, SparseTeacher
from stillhouse.teachers.bias import CodecBias, compare_codecs, live_teacher_of
from stillhouse.teachers.cached import require_cache
from stillhouse.train.micro_batch import PreparedStep
from stillhouse.train.step import Step


def fill_cache(config: RunConfig, batch_size: int | None = None, only: str | None = None) -> str:
    """Compute what every cached teacher says about each text that is known before training: responses of the
    data set, those that a model writes once, and plain text, as far as the objective needs it.

    Cache hits are passed over, so an interrupted build continues. Of several processes (RANK,
    WORLD_SIZE) each takes a share.

    Args:
        config: the run.
        batch_size: sequences in one forward pass; default: train.micro_batch_size.
        only: the name of the one teacher to fill the cache of; None: all that are cached.

    Returns:
        A line for each teacher on what was done.

    Raises:
        StillhouseError: no teacher is cached or available, or model or data cannot be used.
    """
    names = _filled_caches(config, only)
    parts = assemble(config)
    responses = _known_responses(parts)
    size = batch_size or config.train.micro_batch_size
    return "\n".join(
        ("" if name == MAIN else f"{teacher_path(name)}: ") + _fill(parts, name, responses, size)
        for name in names
    )


def _filled_caches(config: RunConfig, only: str | None) -> list[str]:
    """The names of the teachers whose caches a run fills: all, or `only` this one.

    Raises:
        ConfigError: there is none, or it may not be filled.
    """
    known = config.all_teachers
    if only is not None and only not in known:
        problem = f"no teacher is called {only!r}{nearest(only, tuple(known))}"
        raise ConfigError(Fault("--teacher", problem, allowed=", ".join(known) or "none"))
    names = [name for name in known if known[name].fills_cache and only in (None, name)]
    if not names:
        name = only or next((one for one in known if known[one].caches), MAIN)
        where = teacher_path(name)
        require_cache(known.get(name), where)
        raise ConfigError(
            Fault(f"{where}.on_miss", "a cache is built where the teacher is", got="error", allowed="fill")
        )
    return names


def _fill(parts: Parts, name: str, responses: Sequence[Response], size: int) -> str:
    """Fill the cache of one teacher with this process's share of the responses that it is needed for."""
    rank, ranks = rank_and_size()
    objective: Objective = parts.config.objective
    needed = [
        response
        for response in responses
        if name in objective.teachers_of(response.source, response.prompt.facts.get("teacher"))
    ]
    mine = sorted(needed, key=lambda r: len(r.prompt.token_ids) + len(r.token_ids))[rank::ranks]
    translator = parts.translator if name == MAIN else None
    vocab = len(translator.teacher) if translator else parts.vocab
    teacher = parts.config.all_teachers[name].build(parts.teachers[name], vocab)
    title = f"Filling the cache of {teacher_path(name)}"
    with console.progress(title, total=sum(len(r.token_ids) for r in mine)) as bar:
        for start in range(0, len(mine), size):
            known = collate(mine[start : start + size], parts.facts.pad_id)
            if translator is None:
                batch = read_by_teacher(known, parts.facts.pad_id, name)
            else:
                batch, _ = translator.teacher_batch(known.responses)
            _query(teacher, batch.to(local_device()))
            bar.advance(known.num_rows)
    return teacher.close() or "There is nothing to build: the objective needs it for no known text."


def _known_responses(parts: Parts) -> list[Response]:
    """The responses that do not depend on the training."""
    config = parts.config
    folder = RunFolder(default_folder(config))
    with folder.alone():  # a run in it may be writing the same responses
        # Version 0: what the student writes before its first step.
        found = config.responses.known_responses(make_context(parts, folder, lambda: 0))
    return [*found, *(parts.data.text or ())]


def _query(teacher: AnyTeacher, batch: TokenBatch) -> None:
    if isinstance(teacher, SparseTeacher):
        teacher.sparse_logprobs(batch)
    else:
        teacher.hidden(batch)


def measure_bias(
    config: RunConfig, prompts: int = 32, name: str = MAIN
) -> tuple[float, list[CodecBias], list[str]]:
    """Loss and gradient of the student as it starts, over each codec, against the live teacher.

    Args:
        config: the run; its responses and its objective are used, at step 0.
        prompts: how many prompts are drawn from the training data.
        name: of the cached teacher.

    Returns:
        The live loss, a row for each codec, and the names of codecs that the objective cannot be computed
        from.

    Raises:
        StillhouseError: no teacher is available, or model or data cannot be used.
    """
    cached = config.all_teachers.get(name)
    live = live_teacher_of(cached, teacher_path(name))
    changed = {"teacher": live} if name == MAIN else {"teachers": {**config.teachers, name: live}}
    parts = assemble(config.model_copy(update=changed))
    parts.student.eval()
    parts = replace(parts, data=replace(parts.data, train=parts.data.train[:prompts]))
    with tempfile.TemporaryDirectory() as place:
        step = make_step(parts, RunFolder(Path(place)))
        count = -(-len(parts.data.train) // config.train.micro_batch_size)
        prepared = step.prepare(list(parts.data.train), Progress(0, 1, 0.0, 1.0), count)
        return compare_codecs(
            cached,
            step.teachers[name],
            parts.vocab,
            config.objective.requirements().accepted(name),
            lambda teacher: _gradient(_with_teacher(step, name, teacher), parts, prepared),
            sum(micro.batch.num_rows for micro in prepared.micro_batches),
            Path(place),
        )


def _with_teacher(step: Step, name: str, teacher: AnyTeacher) -> Step:
    """The same step with another teacher of this name."""
    return replace(step, teachers={**step.teachers, name: teacher})


def _gradient(step: Step, parts: Parts, prepared: PreparedStep) -> tuple[float, Tensor]:
    """The loss of the step, and its gradient as one vector."""
    parts.student.zero_grad(set_to_none=True)
    total = 0.0
    for micro in prepared.micro_batches:
        found = step.loss(parts.student, micro)
        found.loss.backward()
        total += found.value.item()
    trained = [p for p in parts.student.parameters() if p.requires_grad and p.grad is not None]
    return total, torch.cat([p.grad.flatten().float().cpu() for p in trained])  # type: ignore[union-attr]
