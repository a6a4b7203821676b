"""What an objective may know about each row beyond the logits of the two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.core.alignment import TokenAlignment
from stillhouse.core.host import Ints, RowIndex, as_host, carried, to_device
from stillhouse.core.requirements import MAIN
from stillhouse.core.sparse import SparseLogprobs
from stillhouse.core.types import SOURCES, Source

ON_HOST = ("sources", "sequence_ids", "pair_ids", "loss_mask", "teacher_names")

Signal = Tensor | SparseLogprobs
"""What a teacher says: logits (or hidden states, which a head makes logits of), or log-probabilities of a few
tokens."""


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """What one teacher says about each row; [M] instead of [N] where tokenizers differ.

    Example: `Rows(labels=ids, teachers={"code": TeacherRows(topk_of(logprobs, 64))})`
    """

    signal: Signal | None = None
    """[N, V] logits, or sparse log-probabilities."""
    label_logprobs: Tensor | None = None
    """Log-probability (nats) of the label; computed where an objective needs whole sequences."""
    sequence_gaps: Tensor | None = None
    """The likelihood gap of the row's sequence (see `sequence_gaps`); computed with the log-probabilities."""
    mean_gaps: Tensor | None = None
    """The mean gap over the sequences of the row's source."""
    agreement: Tensor | None = None
    """How much several contexts agree about the row, of which this teacher is the first: its weight."""

    def __getitem__(self, index: RowIndex) -> TeacherRows:
        """Some of the rows."""
        return self._each(index.pick)

    def to(self, device: torch.device | str) -> TeacherRows:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TeacherRows:
        found: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            found[one.name] = value.each(change) if isinstance(value, SparseLogprobs) else value
            if isinstance(value, Tensor):
                found[one.name] = change(value)
        return TeacherRows(**found)


@dataclass(frozen=True, slots=True)
class Rows:
    """Per-row facts, each of shape [N] (or None where nobody gave it). A row is one response token.

    What decides which rows belong together lies on the host, as numpy arrays, so that nothing has to be asked
    of a GPU; tensors are taken too, and one on a GPU is waited for once. The other facts are tensors beside
    the logits.

    Example: `Rows(labels=ids, sources=np.full(N, SOURCES.index("teacher")), sequence_ids=which)`
    """

    labels: Tensor | None = None
    """The token that the row predicts."""
    sources: Ints | None = None
    """Host. Who wrote the response: an index into `stillhouse.core.types.SOURCES`."""
    sequence_ids: Ints | None = None
    """Host. Which sequence of the batch the row belongs to: 0 to S - 1."""
    pair_ids: Ints | None = None
    """Host. Which prompt: the same number for two responses that belong together, one written by the teacher
    and one by the student, or the chosen and the rejected one."""
    loss_mask: NDArray[np.bool_] | None = None
    """Host. False for rows whose token weight is 0, which then reach no head. None: nobody has said, so the
    fused path reads the weights, for which a GPU is waited for."""
    sampled_logprobs: Tensor | None = None
    """Log-probability (nats) of the label under the distribution that it was sampled from."""
    rewards: Tensor | None = None
    """What a reward model gave the row's whole sequence; NaN where none has read it."""
    student_logprobs: Tensor | None = None
    """Log-probability (nats) of the label under the student; computed where an objective needs whole
    sequences."""
    sequence_ratios: Tensor | None = None
    """log q - log q when sampled (nats) of the row's whole sequence; computed with `student_logprobs` where
    `sampled_logprobs` are there."""
    teacher_names: NDArray[np.str_] | None = None
    """Host. The name of the teacher that the row of the data set names; empty where it names none."""
    teachers: Mapping[str, TeacherRows] = field(default_factory=dict)
    """What each teacher says, by its name; the one under `teacher:` is called main."""
    alignment: TokenAlignment | None = None
    """Which rows of the main teacher belong to which of the student, where their tokenizers differ; None: row
    n to row n."""

    def __post_init__(self) -> None:
        for name in ON_HOST:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_host(value))
        lengths = {name: value.shape[0] for name, value in self._facts().items()}
        for name, teacher in self.teachers.items():
            if teacher.signal is not None and (self.alignment is None or name != MAIN):
                lengths[f"teacher {name}"] = len(teacher.signal)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all fields of Rows have one entry per row, got {lengths}")

    def __getitem__(self, index: RowIndex | slice | Tensor) -> Rows:
        """Some of the rows. A tensor of positions or a mask on a GPU is waited for; the others are not."""
        if isinstance(index, Tensor):
            positions = as_host(index)
            index = RowIndex.of(np.flatnonzero(positions) if positions.dtype == np.bool_ else positions)
        elif isinstance(index, slice):
            index = RowIndex(index)
        picked: dict[str, Any] = {
            name: index.pick(value) if isinstance(value, Tensor) else value[index.host]
            for name, value in self._facts().items()
        }
        if self.teachers:
            picked["teachers"] = {
                name: teacher[self.teacher_index(name, index)] for name, teacher in self.teachers.items()
            }
        if self.alignment is not None:
            picked["alignment"] = self.alignment.at(index.host)
        return replace(self, **picked)

    def with_signals(self, signals: Mapping[str, Signal]) -> Rows:
        """With what teachers say, by name."""
        if not signals:
            return self
        found = dict(self.teachers)
        for name, signal in signals.items():
            known = found.get(name, TeacherRows())
            labels = signal.labels if isinstance(signal, SparseLogprobs) else None
            labels = known.label_logprobs if labels is None else labels
            found[name] = replace(known, signal=signal, label_logprobs=labels)
        return replace(self, teachers=found)

    def logits(self, teacher: str) -> Tensor:
        """[N, V]: those of a teacher that gives whole distributions."""
        signal = self.teachers[teacher].signal
        assert isinstance(signal, Tensor)
        return signal

    def cloned(self, teacher: str) -> Rows:
        """With a copy of that teacher's logits, which may then be overwritten."""
        found = self.teachers.get(teacher)
        if found is None or not isinstance(found.signal, Tensor):
            return self
        return self.with_signals({teacher: found.signal.clone()})

    def of_source(self, *sources: Source) -> Ints:
        """The positions of the rows of these sources."""
        assert self.sources is not None
        return np.flatnonzero(np.isin(self.sources, [SOURCES.index(source) for source in sources]))

    def teacher_index(self, name: str, index: RowIndex) -> RowIndex:
        """Which rows of a teacher go with these of the student."""
        if self.alignment is None or name != MAIN:
            return index
        return RowIndex.of(self.alignment.teacher_rows(index.host))

    def shares_labels(self, name: str) -> bool:
        """Whether row n of a teacher predicts the label of row n of the student."""
        return name != MAIN or self.alignment is None or self.alignment.same_rows

    @property
    def count(self) -> int | None:
        """How many rows; None if no field is set."""
        return next((value.shape[0] for value in self._facts().values()), None)

    def to(self, device: torch.device | str) -> Rows:
        """The same rows with their tensors on `device`; a GPU is not waited for."""
        tensors = self.tensors()
        moved = self.with_tensors(dict(zip(tensors, carried(list(tensors.values()), device), strict=True)))
        return replace(moved, teachers={name: one.to(device) for name, one in self.teachers.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Its own tensors, without those of teachers, by the name of their field."""
        return {name: value for name, value in self._facts().items() if isinstance(value, Tensor)}

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Rows:
        """With other tensors in some of its fields."""
        values: dict[str, Any] = dict(changed)
        return replace(self, **values)

    def _facts(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor | np.ndarray)}


def with_gaps(rows: Rows) -> Rows:
    """The rows with the gaps of each teacher and the ratios of sequences filled in where what they are made
    of is there."""
    if rows.student_logprobs is None or rows.sequence_ids is None:
        return rows
    if rows.sampled_logprobs is not None:
        ratio = rows.student_logprobs.detach() - rows.sampled_logprobs
        sequences = to_device(rows.sequence_ids, ratio.device)
        sums = ratio.new_zeros(int(rows.sequence_ids.max(initial=-1)) + 1).index_add(0, sequences, ratio)
        rows = replace(rows, sequence_ratios=sums[sequences])
    if rows.sources is None or rows.sequence_ids is None:
        return rows
    teachers = dict(rows.teachers)
    for name, teacher in rows.teachers.items():
        if teacher.label_logprobs is None:
            continue
        gap, sources = sequence_gaps(rows, name)
        mean = torch.zeros_like(gap)
        for code in np.unique(sources):
            index = RowIndex.of(np.flatnonzero(sources == code)).on(gap.device)
            mean[index] = gap[index].mean()
        ids = to_device(rows.sequence_ids, gap.device)
        teachers[name] = replace(teacher, sequence_gaps=gap[ids], mean_gaps=mean[ids])
    return replace(rows, teachers=teachers)


def sequence_means(values: Tensor, sequence_ids: Ints) -> Tensor:
    """The mean of `values` [N] over each sequence, [S]."""
    lengths = to_device(np.bincount(sequence_ids), values.device)
    total = torch.zeros(lengths.shape[0], dtype=values.dtype, device=values.device)
    return total.index_add(0, to_device(sequence_ids, values.device), values) / lengths.clamp_min(1)


def sequence_gaps(rows: Rows, teacher: str = MAIN) -> tuple[Tensor, Ints]:
    """For each sequence the likelihood gap exp(mean log p) - exp(mean log q), and its source (an index),
    both [S].

    The means run over the labels of the sequence; p is the teacher, q the student (methods of DistiLLM-2,
    section 3.3; released code at commit fe4cf9b). Detached.
    """
    student, ids = rows.student_logprobs, rows.sequence_ids
    logprobs = rows.teachers.get(teacher, TeacherRows()).label_logprobs
    if student is None or logprobs is None or ids is None or rows.sources is None:
        raise ValueError(
            "likelihood gaps need sequence_ids, sources and the label log-probabilities of both models"
        )
    gap = sequence_means(logprobs.detach(), ids).exp() - sequence_means(student.detach(), ids).exp()
    sources = np.full(gap.shape[0], -1)
    sources[ids] = rows.sources
    return gap, sources
