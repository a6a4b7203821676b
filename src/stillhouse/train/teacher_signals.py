"""A teacher's signal for a micro-batch: computed, read from the cache, or skipped where no loss needs it."""

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


def sequences_needing(objective: Objective, batch: Batch, teacher: str) -> list[int]:
    """The indices of the sequences whose objective needs this teacher."""
    return [
        index
        for index, response in enumerate(batch.responses)
        if teacher in objective.teachers_of(response.source, response.prompt.facts.get("teacher"))
    ]


def prefetch(teacher: AnyTeacher, name: str, micro_batches: Sequence[MicroBatch]) -> None:
    """Hand all micro-batches of a step at once to a teacher that prefetches."""
    if not isinstance(teacher, PrefetchingTeacher):
        return
    parts = []
    for micro in micro_batches:
        needed = sequences_needing(micro.objective, micro.batch, name)
        if needed:
            parts.append(micro.read_by(name).select(needed))
    teacher.prefetch(parts)


def teacher_signal(
    teacher: AnyTeacher,
    batch: TokenBatch,
    needed: Sequence[int],
    cache: TeacherHiddenCache,
    slots: Sequence[int] = (),
) -> Tensor | SparseLogprobs:
    """The teacher's signal as `fused_rows` takes it: hidden states [N, Dt], or sparse log-probabilities.

    The teacher runs on cache misses only. Sequences that no loss needs get zeros or no entries; a sparse
    teacher has a cache of its own.

    Args:
        teacher: the running teacher.
        batch: its input.
        needed: the sequences that its signal is needed for.
        cache: hidden states of responses that are trained on again.
        slots: for each sequence its slot in the cache; empty if nothing is cached.
    """
    if isinstance(teacher, SparseTeacher):
        return _sparse_logprobs(teacher, batch, needed)
    slots = slots or [NO_SLOT] * len(batch)
    cached = {row: cache.get(slots[row]) for row in needed}
    missing = [row for row in needed if cached[row] is None]
    if len(missing) == len(batch):
        hidden = teacher.hidden(batch)
        new = dict(enumerate(hidden.split(list(batch.row_counts))))
    else:
        new = _hidden_of(teacher, batch, missing)
        hidden = _assembled(teacher, batch, {**cached, **new})
    for row, states in new.items():
        cache.put(slots[row], states)
    return hidden


def _sparse_logprobs(teacher: SparseTeacher, batch: TokenBatch, needed: Sequence[int]) -> SparseLogprobs:
    device = batch.input_ids.device
    if len(needed) == len(batch):
        return teacher.sparse_logprobs(batch)
    if not needed:
        return empty_sparse(teacher.form, batch.num_rows, device)
    rows = np.flatnonzero(np.isin(batch.row_sequences, needed))
    return scatter_sparse(
        teacher.sparse_logprobs(batch.select(needed)), to_device(rows, device), batch.num_rows
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
