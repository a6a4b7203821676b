"""A teacher's signal for a micro-batch: computed, cached, or left out where no loss asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.batch import Batch, TokenBatch
from stillhouse.core.host import to_device
from stillhouse.core.sparse import SparseLogprobs, empty_sparse, scatter_sparse
from stillhouse.objectives import Objective
from stillhouse.rollouts import TeacherHiddenCache
from stillhouse.rollouts.hidden_cache import NO_SLOT
from stillhouse.teachers import AnyTeacher, PrefetchingTeacher, SparseTeacher, Teacher
from stillhouse.train.micro_batch import MicroBatch


def asked_sequences(objective: Objective, batch: Batch, teacher: str) -> list[int]:
    """The sequences of a batch whose objective compares with this teacher."""
    return [
        index
        for index, response in enumerate(batch.responses)
        if teacher in objective.teachers_of(response.source, response.prompt.facts.get("teacher"))
    ]


def prefetch(teacher: AnyTeacher, name: str, micro_batches: Sequence[MicroBatch], main: bool) -> None:
    """Let a teacher that is faster that way hear of all micro-batches of a step at once."""
    if not isinstance(teacher, PrefetchingTeacher):
        return
    parts = []
    for micro in micro_batches:
        asked = asked_sequences(micro.objective, micro.batch, name)
        if asked:
            parts.append((micro.teacher_batch if main else micro.batch).select(asked))
    teacher.prefetch(parts)


def teacher_signal(
    teacher: AnyTeacher,
    batch: TokenBatch,
    asked: Sequence[int],
    cache: TeacherHiddenCache,
    slots: Sequence[int] = (),
) -> Tensor | SparseLogprobs:
    """What `fused_rows` takes of a teacher: hidden states [N, Dt], or a few tokens of each of the N rows.

    The teacher runs on as few sequences as it can: those that nobody asks it about get zeros or no entries,
    cached ones what was kept, and what is new and retained is cached. A sparse teacher caches for itself.

    Args:
        teacher: the running teacher.
        batch: what it reads.
        asked: the sequences that its signal is needed for.
        cache: hidden states of responses that come again.
        slots: for each sequence its slot in the cache; empty if nothing is cached.
    """
    if isinstance(teacher, SparseTeacher):
        return _sparse_logprobs(teacher, batch, asked)
    slots = slots or [NO_SLOT] * len(batch)
    known = {row: cache.get(slots[row]) for row in asked}
    missing = [row for row in asked if known[row] is None]
    if len(missing) == len(batch):
        hidden = teacher.hidden(batch)
        new = dict(enumerate(hidden.split(list(batch.row_counts))))
    else:
        new = _hidden_of(teacher, batch, missing)
        hidden = _assembled(teacher, batch, {**known, **new})
    for row, states in new.items():
        cache.put(slots[row], states)
    return hidden


def _sparse_logprobs(teacher: SparseTeacher, batch: TokenBatch, asked: Sequence[int]) -> SparseLogprobs:
    device = batch.input_ids.device
    if len(asked) == len(batch):
        return teacher.sparse_logprobs(batch)
    if not asked:
        return empty_sparse(teacher.form, batch.num_rows, device)
    rows = np.flatnonzero(np.isin(batch.row_sequences, asked))
    return scatter_sparse(
        teacher.sparse_logprobs(batch.select(asked)), to_device(rows, device), batch.num_rows
    )


def _hidden_of(teacher: Teacher, batch: TokenBatch, sequences: Sequence[int]) -> dict[int, Tensor]:
    """The teacher on some sequences of the batch, cut to the longest of them."""
    if not sequences:
        return {}
    part = batch.select(sequences)
    return dict(zip(sequences, teacher.hidden(part).split(list(part.row_counts)), strict=True))


def _assembled(teacher: Teacher, batch: TokenBatch, found: Mapping[int, Tensor | None]) -> Tensor:
    """[N, Dt]; zeros for sequences that are not among `found`."""
    weight = teacher.head.weight
    dtype = next((states.dtype for states in found.values() if states is not None), weight.dtype)
    parts = []
    for row, count in enumerate(batch.row_counts):
        states = found.get(row)
        if states is None:
            states = torch.zeros(count, weight.shape[1], dtype=dtype)
        parts.append(states.to(batch.input_ids.device, dtype))
    return torch.cat(parts)
