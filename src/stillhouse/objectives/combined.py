"""Objectives made of objectives: a weighted sum on the same text, and a map from who wrote the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.config import ListOf
from stillhouse.core.requirements import Requirements, RunFacts
from stillhouse.core.rows import Rows
from stillhouse.core.sparse import SparseLogprobs
from stillhouse.core.types import SOURCES
from stillhouse.errors import Fault
from stillhouse.objectives.base import Layers, Objective, ObjectiveField, Split, register


class _Holder(Objective):
    """What objectives that hold others have in common: they need what those need."""

    @abstractmethod
    def held(self) -> tuple[Objective, ...]:
        """The objectives inside."""

    def requirements(self) -> Requirements:
        return Requirements.union(part.requirements() for part in self.held())

    @property
    def mixes_rows(self) -> bool:  # type: ignore[override]
        return any(part.mixes_rows for part in self.held())

    @property
    def exact_gradient(self) -> bool:  # type: ignore[override]
        return all(part.exact_gradient for part in self.held())

    @property
    def has_token_part(self) -> bool:  # type: ignore[override]
        return any(part.has_token_part for part in self.held())

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return all(part.shift_invariant for part in self.held())

    @property
    def divergence(self) -> bool:  # type: ignore[override]
        return all(part.divergence for part in self.held())

    @property
    def has_sequence_part(self) -> bool:  # type: ignore[override]
        return any(part.has_sequence_part for part in self.held())


@register
class Sum(_Holder):
    """A weighted sum of objectives on the same rows.

    Equation: sum_k w_k L_k, w_k the `loss_weight` of term k.
    Gradient: the same sum of the terms' gradients.
    Character: that of its terms.
    When: a distillation loss with some cross-entropy on the same text; the two parts of MiniLLM.
    Source: every method with a weighted loss.
    """

    kind: Literal["sum"] = "sum"
    terms: ListOf[ObjectiveField] = Field(min_length=1)
    """The objectives to add."""

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        parts = [term.loss_weight * term.per_token(student, teacher, rows) for term in self.terms]
        return torch.stack(parts).sum(0)

    def per_token_sparse(self, student: Tensor, compact: SparseLogprobs, rows: Rows) -> Tensor:
        parts = [term.loss_weight * term.per_token_sparse(student, compact, rows) for term in self.terms]
        return torch.stack(parts).sum(0)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        value, gradient = student.new_zeros(student.shape[0]), None
        active = [term for term in self.terms if term.has_token_part]
        for left, term in zip(range(len(active) - 1, -1, -1), active, strict=True):
            ours = student.clone() if left else student  # the last term may overwrite the logits themselves
            theirs = None if teacher is None else teacher.clone() if left else teacher
            part, slope = term.value_and_gradient(ours, theirs, rows)
            value = value + float(term.loss_weight) * part
            if gradient is None:
                gradient = slope.mul_(float(term.loss_weight))
            else:
                gradient.add_(slope, alpha=float(term.loss_weight))
        return value, torch.zeros_like(student) if gradient is None else gradient

    def per_sequence(self, rows: Rows) -> Tensor:
        parts = [term.loss_weight * term.per_sequence(rows) for term in self.terms]
        return torch.stack(parts).sum(0)

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        parts = [t.loss_weight * t.per_layers(student, teacher, rows) for t in self.terms if t.depths]
        return torch.stack(parts).sum(0)

    def held(self) -> tuple[Objective, ...]:
        return tuple(self.terms)

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        for number, term in enumerate(self.terms):
            yield from term.check_in_run(f"{path}.terms[{number}]", facts)


@register
class BySource(_Holder):
    """Another objective for each source: who wrote a response decides how it is learnt from.

    Equation: w_s L_s on the rows of source s, w_s the `loss_weight` of its objective.
    Gradient: that of the row's objective.
    Character: that of the row's objective.
    When: DistiLLM-2's pairs, GKD's mixture of texts, a plain-text loss beside distillation. In YAML the kind
        may be left out: `{teacher: {kind: skew_kl}, student: {kind: skew_rkl}}`.
    Source: Ko et al. 2025, DistiLLM-2 (arXiv 2503.07067), for two sources.
    """

    kind: Literal["by_source"] = "by_source"
    fixed: ObjectiveField | None = None
    """For responses of the data set."""
    teacher: ObjectiveField | None = None
    """For responses that the teacher wrote."""
    student: ObjectiveField | None = None
    """For responses that the student wrote."""
    text: ObjectiveField | None = None
    """For plain text."""

    def mapped(self) -> dict[str, Objective]:
        """The objectives that are there, by source."""
        found = {source: getattr(self, source) for source in SOURCES}
        return {source: objective for source, objective in found.items() if objective is not None}

    def requirements(self) -> Requirements:
        return super().requirements() | Requirements(rows=frozenset({"sources"}))

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        for source, objective in self.mapped().items():
            yield from objective.check_in_run(f"{path}.{source}", replace(facts, sources=frozenset({source})))

    def for_source(self, source: str) -> Objective | None:
        return self.mapped().get(source)

    def source_weight(self, source: str) -> float:
        objective = self.for_source(source)
        return 1.0 if objective is None else float(objective.loss_weight)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.mapped())

    def split(self, rows: Rows) -> list[Split]:
        if rows.sources is None:
            raise ValueError("an objective per source needs the source of every row")
        mapped = self.mapped()
        parts: list[Split] = []
        for code in torch.unique(rows.sources).tolist():
            source = SOURCES[code]
            if source not in mapped:
                raise ValueError(
                    f"rows of source {source!r} came, but the objective maps {', '.join(mapped)}. "
                    f"Add objective.{source}, or change responses so that no such text is drawn"
                )
            objective = mapped[source]
            parts.append((objective.loss_weight, objective, (rows.sources == code).nonzero().squeeze(-1)))
        return parts

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        value = student.new_zeros(student.shape[0])
        for weight, objective, index in self.split(rows):
            assert index is not None
            theirs = None if teacher is None else teacher[rows.teacher_index(index)]
            part = weight * objective.per_token(student[index], theirs, rows[index])
            value = value.index_put((index,), part)
        return value

    def per_token_sparse(self, student: Tensor, compact: SparseLogprobs, rows: Rows) -> Tensor:
        value = student.new_zeros(student.shape[0])
        for weight, objective, index in self.split(rows):
            assert index is not None
            part = weight * objective.per_token_sparse(student[index], compact[index], rows[index])
            value = value.index_put((index,), part)
        return value

    def per_sequence(self, rows: Rows) -> Tensor:
        assert rows.student_logprobs is not None
        value = torch.zeros_like(rows.student_logprobs)
        for weight, objective, index in self.split(rows):
            assert index is not None
            value = value.index_put((index,), weight * objective.per_sequence(rows[index]))
        return value

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        some = next(iter(student.values()))
        value = some.new_zeros(some.shape[0])
        for weight, objective, index in self.split(rows):
            assert index is not None
            if objective.depths:
                theirs = rows.teacher_index(index)
                ours = {depth: states[index] for depth, states in student.items()}
                others = {depth: states[theirs] for depth, states in teacher.items()}
                part = weight * objective.per_layers(ours, others, rows[index])
                value = value.index_put((index,), part)
        return value

    def held(self) -> tuple[Objective, ...]:
        return tuple(self.mapped().values())
