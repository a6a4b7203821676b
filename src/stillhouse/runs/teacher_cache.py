"""Fills a run's teacher cache before training; measures how each codec biases loss and gradient."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stillhouse import console
from stillhouse.core.batch import TokenBatch
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import SOURCES, Progress, Response
from stillhouse.data.collate import collate, read_by_teacher
from stillhouse.errors import ConfigError, Fault
from stillhouse.models import local_device
from stillhouse.rollouts.fixed import reference_response
from stillhouse.runs.build import Parts, assemble, make_context, make_step
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder, default_folder
from stillhouse.teachers import AnyTeacher, SparseTeacher
from stillhouse.teachers.bias import CodecBias, compare_codecs, live_teacher_of
from stillhouse.teachers.cached import require_cache
from stillhouse.train.micro_batch import PreparedStep
from stillhouse.train.step import Step


def fill_cache(config: RunConfig, batch_size: int | None = None) -> str:
    """Compute the teacher's signal for every text that is known before training: responses of the data set,
    those that the teacher generates once, and plain text, as far as the objective needs it.

    Cache hits are passed over, so an interrupted build continues. Of several processes (RANK,
    WORLD_SIZE) each takes a share.

    Args:
        config: the run.
        batch_size: sequences in one forward pass; default: train.micro_batch_size.

    Returns:
        A line on what was done.

    Raises:
        StillhouseError: no teacher is available, or model or data cannot be used.
    """
    teacher_config = require_cache(config.teacher)
    if teacher_config.on_miss == "error":
        raise ConfigError(
            Fault("teacher.on_miss", "a cache is built where the teacher is", got="error", allowed="fill")
        )
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = local_device()
    parts = assemble(config)
    responses = list(_known_responses(parts))
    responses.sort(key=lambda r: len(r.prompt.token_ids) + len(r.token_ids))
    mine = responses[rank::ranks]
    translator = parts.translator
    teacher = teacher_config.build(parts.teacher, len(translator.teacher) if translator else parts.vocab)
    size = batch_size or config.train.micro_batch_size
    with console.progress("Filling the teacher cache", total=sum(len(r.token_ids) for r in mine)) as bar:
        for start in range(0, len(mine), size):
            known = collate(mine[start : start + size], parts.facts.pad_id)
            batch: TokenBatch
            rows = known.num_rows
            if translator is None:
                batch = read_by_teacher(known, parts.facts.pad_id)
            else:
                batch, _ = translator.teacher_batch(mine[start : start + size])
            _query(teacher, batch.to(device))
            bar.advance(rows)
    return teacher.close() or "There is nothing to build: the objective needs the teacher for no known text."


def _known_responses(parts: Parts) -> Iterator[Response]:
    """The responses that do not depend on the student, as far as the objective needs the teacher for them."""
    config = parts.config
    needed = {source for source in SOURCES if MAIN in config.objective.teachers_of(source)}
    sources = config.responses.sources() & needed
    if "fixed" in sources:
        yield from (
            reference_response(prompt) for prompt in parts.data.train if prompt.response_ids is not None
        )
    if "teacher" in sources:
        folder = RunFolder(default_folder(config))
        with folder.alone():  # a run in it may be writing the same responses
            found = config.responses.static_teacher_responses(make_context(parts, folder))
        yield from found
    if "text" in needed and parts.data.text:
        yield from parts.data.text


def _query(teacher: AnyTeacher, batch: TokenBatch) -> None:
    if isinstance(teacher, SparseTeacher):
        teacher.sparse_logprobs(batch)
    else:
        teacher.hidden(batch)


def measure_bias(config: RunConfig, prompts: int = 32) -> tuple[float, list[CodecBias], list[str]]:
    """Loss and gradient of the student as it starts, over each codec, against the live teacher.

    Args:
        config: the run; its responses and its objective are used, at step 0.
        prompts: how many prompts are drawn from the training data.

    Returns:
        The live loss, a row for each codec, and the names of codecs that the objective cannot be computed
        from.

    Raises:
        StillhouseError: no teacher is available, or model or data cannot be used.
    """
    live_config = live_teacher_of(config.teacher)
    parts = assemble(config.model_copy(update={"teacher": live_config}))
    parts.student.eval()
    parts = replace(parts, data=replace(parts.data, train=parts.data.train[:prompts]))
    with tempfile.TemporaryDirectory() as place:
        step = make_step(parts, RunFolder(Path(place)))
        count = -(-len(parts.data.train) // config.train.micro_batch_size)
        prepared = step.prepare(list(parts.data.train), Progress(0, 1, 0.0, 1.0), count)
        return compare_codecs(
            config.teacher,
            step.teachers[MAIN],
            parts.vocab,
            config.objective.forms,
            lambda teacher: _gradient(_with_main_teacher(step, teacher), parts, prepared),
            sum(micro.batch.num_rows for micro in prepared.micro_batches),
            Path(place),
        )


def _with_main_teacher(step: Step, teacher: AnyTeacher) -> Step:
    """The same step with another main teacher."""
    return replace(step, teachers={**step.teachers, MAIN: teacher})


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
