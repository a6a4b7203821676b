"""What an objective may know about each row beyond the logits of the two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.core.host import Ints, RowIndex, as_host, to_device
from stillhouse.core.types import SOURCES, Source

if TYPE_CHECKING:
    from stillhouse.core.alignment import TokenAlignment
    from stillhouse.core.head import ModelSignal
    from stillhouse.core.sparse import SparseLogprobs

ON_HOST = ("sources", "sequence_ids", "pair_ids", "loss_mask", "teachers")


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
    """Host. Which prompt: the same number for a teacher-written and a student-written response that belong
    together."""
    loss_mask: NDArray[np.bool_] | None = None
    """Host. False for rows whose token weight is 0, which then reach no head. None: nobody has said, so the
    fused path reads the weights, for which a GPU is waited for."""
    sampled_logprobs: Tensor | None = None
    """Log-probability (nats) of the label under the distribution that it was sampled from."""
    student_logprobs: Tensor | None = None
    """Log-probability (nats) of the label under the student; computed where an objective needs whole
    sequences."""
    teacher_logprobs: Tensor | None = None
    """Log-probability (nats) of the label under the teacher."""
    sequence_gaps: Tensor | None = None
    """The likelihood gap of the row's sequence (see `sequence_gaps`); computed with the log-probabilities."""
    mean_gaps: Tensor | None = None
    """The mean gap over the sequences of the row's source."""
    teachers: NDArray[np.str_] | None = None
    """Host. The name of the teacher that the row of the data set names; empty where it names none."""
    others: Mapping[str, ModelSignal] = field(default_factory=dict)
    """Teachers beside the main one by their name, for the fused path; not cut with the rows."""
    model_logits: Mapping[str, Tensor] = field(default_factory=dict)
    """[N, V] each: the logits of teachers beside the main one, by name."""
    model_logprobs: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] each: log-probability (nats) of the label under them; computed as `teacher_logprobs` is."""
    alignment: TokenAlignment | None = None
    """Which rows of the teacher belong to which of the student, where tokenizers differ; None: row n to row
    n."""
    compact: SparseLogprobs | None = None
    """What a teacher says that gives no whole distribution."""

    def __post_init__(self) -> None:
        for name in ON_HOST:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_host(value))
        lengths = {name: value.shape[0] for name, value in self._facts().items()}
        if self.compact is not None:
            lengths["compact"] = len(self.compact)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all fields of Rows have one entry per row, got {lengths}")

    def __getitem__(self, index: RowIndex | slice | Tensor) -> Rows:
        """Some of the rows. A tensor of positions or a mask on a GPU is waited for; the others are not."""
        if isinstance(index, slice):
            index = RowIndex.run(index)
        if isinstance(index, Tensor):
            index = RowIndex(as_host(index), index)
        picked: dict[str, Any] = {
            name: value[index.device if isinstance(value, Tensor) else index.host]
            for name, value in self._facts().items()
        }
        if self.alignment is not None:
            picked["alignment"] = self.alignment.at(index.host)
        if self.compact is not None:
            picked["compact"] = self.compact[index.device]
        for name in ("model_logits", "model_logprobs"):
            of_models: Mapping[str, Tensor] = getattr(self, name)
            if of_models:
                picked[name] = {model: values[index.device] for model, values in of_models.items()}
        return replace(self, **picked)

    def of_teacher(self, model: str) -> Rows:
        """With what another teacher than the main one says about the labels in place of the main one."""
        if model not in self.model_logprobs:
            return self
        return with_gaps(replace(self, teacher_logprobs=self.model_logprobs[model]))

    def of_source(self, *sources: Source) -> Ints:
        """The positions of the rows of these sources."""
        assert self.sources is not None
        return np.flatnonzero(np.isin(self.sources, [SOURCES.index(source) for source in sources]))

    def teacher_index(self, index: RowIndex, device: torch.device) -> RowIndex:
        """Which rows of the teacher go with these of the student."""
        if self.alignment is None:
            return index
        return RowIndex.of(self.alignment.teacher_rows(index.host), device)

    @property
    def count(self) -> int | None:
        """How many rows; None if no field is set."""
        return next((value.shape[0] for value in self._facts().values()), None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same rows with their tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self._facts().items()
            if isinstance(value, Tensor)
        }
        if self.compact is not None:
            moved["compact"] = self.compact.to(device)
        return replace(self, **moved)

    def _facts(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor | np.ndarray)}


def with_gaps(rows: Rows) -> Rows:
    """The rows with `sequence_gaps` and `mean_gaps` filled in where what they are made of is there."""
    made_of = (rows.student_logprobs, rows.teacher_logprobs, rows.sequence_ids, rows.sources)
    if any(fact is None for fact in made_of):
        return rows
    assert rows.sequence_ids is not None
    gap, sources = sequence_gaps(rows)
    mean = torch.zeros_like(gap)
    for code in np.unique(sources):
        index = RowIndex.of(np.flatnonzero(sources == code), gap.device).device
        mean[index] = gap[index].mean()
    ids = to_device(rows.sequence_ids, gap.device)
    return replace(rows, sequence_gaps=gap[ids], mean_gaps=mean[ids])


def sequence_means(values: Tensor, sequence_ids: Ints) -> Tensor:
    """The mean of `values` [N] over each sequence, [S]."""
    lengths = to_device(np.bincount(sequence_ids), values.device)
    total = torch.zeros(lengths.shape[0], dtype=values.dtype, device=values.device)
    return total.index_add(0, to_device(sequence_ids, values.device), values) / lengths.clamp_min(1)


def sequence_gaps(rows: Rows) -> tuple[Tensor, Ints]:
    """For each sequence the likelihood gap exp(mean log p) - exp(mean log q), and its source (an index),
    both [S].

    The means run over the labels of the sequence; p is the teacher, q the student (methods of DistiLLM-2,
    section 3.3; released code at commit fe4cf9b). Detached.
    """
    student, teacher, ids = rows.student_logprobs, rows.teacher_logprobs, rows.sequence_ids
    if student is None or teacher is None or ids is None or rows.sources is None:
        raise ValueError(
            "likelihood gaps need sequence_ids, sources and the label log-probabilities of both models"
        )
    gap = sequence_means(teacher.detach(), ids).exp() - sequence_means(student.detach(), ids).exp()
    sources = np.full(gap.shape[0], -1)
    sources[ids] = rows.sources
    return gap, sources
