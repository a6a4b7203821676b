"""The teachers' signals for a micro-batch: computed, read from a cache, or left out where no loss asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.core.batch import Batch, TokenBatch
from stillhouse.core.head import ModelSignal
from stillhouse.core.host import to_device
from stillhouse.core.requirements import MAIN
from stillhouse.core.sparse import SparseLogprobs, empty_sparse, scatter_sparse
from stillhouse.objectives import Objective
from stillhouse.objectives.base import Layers
from stillhouse.rollouts import TeacherHiddenCache
from stillhouse.rollouts.hidden_cache import NO_SLOT
from stillhouse.teachers import AnyTeacher, PrefetchingTeacher, SparseTeacher, Teacher
from stillhouse.teachers.base import LayerTeacher
from stillhouse.train.metrics import MetricAccumulator
from stillhouse.train.micro_batch import MicroBatch


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """What the teachers say about one micro-batch."""

    micro: MicroBatch
    """On its device."""
    signals: Mapping[str, ModelSignal]
    """Of each teacher, by name."""
    layers: Layers
    """The main teacher's states at the compared depths."""

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that were made for it."""
        yield from self.micro.tensors()
        yield from self.layers.values()
        for one in self.signals.values():
            if isinstance(one.signal, SparseLogprobs):
                yield from one.signal.tensors().values()
            elif one.signal is not None:
                yield one.signal


@dataclass(frozen=True, slots=True)
class TeacherSignals:
    """Asks all teachers about micro-batches, without gradient."""

    teachers: Mapping[str, AnyTeacher]
    hidden_cache: TeacherHiddenCache
    metrics: MetricAccumulator

    def of(self, micro: MicroBatch) -> TeacherOutputs:
        """For a micro-batch that is on its device."""
        signals: dict[str, ModelSignal] = {}
        layers: Layers = {}
        signal: Tensor | SparseLogprobs
        for name, teacher in self.teachers.items():
            before = getattr(teacher, "tokens", 0)
            batch = micro.read_by(name)
            with self.metrics.seconds("teacher"):
                if name == MAIN and micro.objective.depths:
                    assert isinstance(teacher, LayerTeacher)
                    signal, layers = teacher.layers(batch, micro.objective.depths)
                else:
                    needed = sequences_needing(micro.objective, micro.batch, name)
                    slots = micro.cache_slots if name == MAIN else ()
                    signal = teacher_signal(teacher, batch, needed, self.hidden_cache, slots)
            signals[name] = ModelSignal(signal, teacher.head if isinstance(teacher, Teacher) else None)
            for metric, (total, count) in teacher.pop_metrics().items():
                self.metrics.add_mean(metric if name == MAIN else f"{metric}/{name}", total, count)
            if tokens := getattr(teacher, "tokens", 0) - before:
                self.metrics.add("tokens/teacher", float(tokens))
        if any(map(_is_trained, self.teachers.values())):
            torch.clear_autocast_cache()  # casts made without gradient would leave the student none
        return TeacherOutputs(micro, signals, layers)


def _is_trained(teacher: AnyTeacher) -> bool:
    """Whether its weights are the student's."""
    model = getattr(teacher, "model", None)
    return isinstance(model, nn.Module) and any(weight.requires_grad for weight in model.parameters())


def sequences_needing(objective: Objective, batch: Batch, teacher: str) -> list[int]:
    """The indices of the sequences whose objective needs this teacher."""
    return [
        index
        for index, response in enumerate(batch.responses)
        if teacher in objective.teachers_of(response.source, response.prompt.facts.get("teacher"))
    ]


def prefetch(
    teacher: AnyTeacher, name: str, micro_batches: Sequence[MicroBatch], cache: TeacherHiddenCache
) -> None:
    """Hand all micro-batches of a step at once to a teacher that prefetches, without what is in memory."""
    if not isinstance(teacher, PrefetchingTeacher):
        return
    parts = []
    for micro in micro_batches:
        slots = (micro.cache_slots if name == MAIN else ()) or [NO_SLOT] * len(micro.batch)
        needed = [
            row
            for row in sequences_needing(micro.objective, micro.batch, name)
            if cache.get(slots[row]) is None
        ]
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

    The teacher runs on cache misses only, one that several processes share on everything. Sequences that no
    loss needs get zeros or no entries; a sparse teacher has a cache of its own.

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
    if len(missing) == len(batch) or getattr(teacher, "in_step", False):
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
    parts, device = [], batch.input_ids.device
    for row, count in enumerate(batch.row_counts):
        states = found.get(row)
        if states is None:
            parts.append(torch.zeros(count, weight.shape[1], dtype=dtype, device=device))
        else:  # the cast comes after the copy, which the host does not wait for
            parts.append(states.to(device, non_blocking=True).to(dtype))
    return torch.cat(parts)
