"""What an objective may know about each row beyond the logits of the two models."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.core.types import SOURCES

if TYPE_CHECKING:
    from stillhouse.core.alignment import TokenAlignment
    from stillhouse.core.head import ModelHead
    from stillhouse.core.sparse import SparseLogprobs


@dataclass(frozen=True, slots=True)
class Rows:
    """Per-row facts, each a tensor of shape [N] (or None where nobody gave it). A row is one response token.

    Example: `Rows(labels=ids, sources=torch.full((N,), SOURCES.index("teacher")), sequence_ids=which)`
    """

    labels: Tensor | None = None
    """The token that the row predicts."""
    sources: Tensor | None = None
    """Who wrote the response: an index into `stillhouse.core.types.SOURCES`."""
    sequence_ids: Tensor | None = None
    """Which sequence of the batch the row belongs to: 0 to S - 1."""
    pair_ids: Tensor | None = None
    """Which prompt: the same number for a teacher-written and a student-written response that belong
    together."""
    positions: Tensor | None = None
    """Index of the token in its response."""
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
    reference_logits: Tensor | None = None
    """[N, V]: logits of a second teacher, for `advantage` and `aligned_teacher`."""
    reference_hidden: Tensor | None = None
    """[N, Dr]: its hidden states, for the fused path."""
    reference_head: ModelHead | None = None
    """Its head, for the fused path; says nothing about single rows."""
    alignment: TokenAlignment | None = None
    """Which rows of the teacher belong to which of the student, where tokenizers differ; None: row n to row
    n."""
    compact: SparseLogprobs | None = None
    """What a teacher says that gives no whole distribution."""

    def __post_init__(self) -> None:
        lengths = {name: value.shape[0] for name, value in self._tensors().items()}
        if self.compact is not None:
            lengths["compact"] = len(self.compact)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all fields of Rows have one entry per row, got {lengths}")

    def __getitem__(self, index: Tensor | slice) -> Rows:
        """The rows that `index` (a slice, a mask or a tensor of positions) picks."""
        picked: dict[str, Any] = {name: value[index] for name, value in self._tensors().items()}
        if self.alignment is not None:
            everything = torch.arange(
                len(self.alignment.student_groups), device=self.alignment.student_groups.device
            )
            picked["alignment"] = self.alignment.at(everything[index])
        if self.compact is not None:
            picked["compact"] = self.compact[index]
        return replace(self, **picked)

    def teacher_index(self, index: Tensor) -> Tensor:
        """Which rows of the teacher go with these of the student."""
        return index if self.alignment is None else self.alignment.teacher_rows(index)

    @property
    def count(self) -> int | None:
        """How many rows; None if no field is set."""
        return next((value.shape[0] for value in self._tensors().values()), None)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def with_gaps(rows: Rows) -> Rows:
    """The rows with `sequence_gaps` and `mean_gaps` filled in where what they are made of is there."""
    made_of = (rows.student_logprobs, rows.teacher_logprobs, rows.sequence_ids, rows.sources)
    if any(fact is None for fact in made_of):
        return rows
    gap, sources = sequence_gaps(rows)
    mean = torch.zeros_like(gap)
    for code in torch.unique(sources):
        mean[sources == code] = gap[sources == code].mean()
    return replace(rows, sequence_gaps=gap[rows.sequence_ids], mean_gaps=mean[rows.sequence_ids])


def sequence_means(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """The mean of `values` [N] over each sequence, [S]."""
    count = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
    total = torch.zeros(count, dtype=values.dtype, device=values.device)
    sizes = torch.zeros_like(total).index_add_(0, sequence_ids, torch.ones_like(values))
    return total.index_add(0, sequence_ids, values) / sizes.clamp_min(1)


def sequence_gaps(rows: Rows) -> tuple[Tensor, Tensor]:
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
    sources = torch.full((gap.shape[0],), -1, dtype=rows.sources.dtype, device=gap.device)
    return gap, sources.index_copy(0, ids, rows.sources)


def likelihood_gaps(rows: Rows) -> dict[str, float]:
    """The mean over the sequences of each source of teacher likelihood minus student likelihood.

    Likelihood is the geometric mean of the label probabilities of a sequence. Teacher-written responses
    usually give a positive number and student-written ones a negative number.
    """
    gap, sources = sequence_gaps(rows)
    found = {name: gap[sources == code] for code, name in enumerate(SOURCES)}
    return {name: float(values.mean()) for name, values in found.items() if values.numel()}
