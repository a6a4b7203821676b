"""Objectives made of objectives: a weighted sum on the same text, and a map from who wrote the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse.config import ListOf
from stillhouse.core.host import RowIndex
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

    def teachers_of(self, source: str, teacher: str | None = None) -> frozenset[str]:
        return frozenset().union(*(part.teachers_of(source, teacher) for part in self.held()))

    def with_teacher(self, name: str) -> Objective:
        raise ValueError(f"{self.name} holds several objectives; name the teacher in each of them")

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
        parts = [term.loss_weight * term.token_values(student, teacher, rows) for term in self.terms]
        return torch.stack(parts).sum(0)

    def per_token_sparse(self, student: Tensor, compact: SparseLogprobs, rows: Rows) -> Tensor:
        rows = replace(rows, compact=compact)
        parts = [term.loss_weight * term.token_values(student, None, rows) for term in self.terms]
        return torch.stack(parts).sum(0)

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        value, gradient = student.new_zeros(student.shape[0]), None
        active = [term for term in self.terms if term.has_token_part]
        for left, term in zip(range(len(active) - 1, -1, -1), active, strict=True):
            ours = student.clone() if left else student  # the last term may overwrite the logits themselves
            theirs = term.teacher_of(teacher, rows)
            theirs = None if theirs is None else theirs.clone() if left else theirs
            part, slope = term.value_and_gradient(ours, theirs, term.rows_of(rows))
            value = value + float(term.loss_weight) * part
            if gradient is None:
                gradient = slope.mul_(float(term.loss_weight))
            else:
                gradient.add_(slope, alpha=float(term.loss_weight))
        return value, torch.zeros_like(student) if gradient is None else gradient

    def per_sequence(self, rows: Rows) -> Tensor:
        parts = [term.loss_weight * term.per_sequence(term.rows_of(rows)) for term in self.terms]
        return torch.stack(parts).sum(0)

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        parts = [t.loss_weight * t.per_layers(student, teacher, rows) for t in self.terms if t.depths]
        return torch.stack(parts).sum(0)

    def held(self) -> tuple[Objective, ...]:
        return tuple(self.terms)

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        for number, term in enumerate(self.terms):
            yield from term.check_in_run(f"{path}.terms[{number}]", facts)


class _Routed(_Holder):
    """What objectives have in common that apply another one to each part of the rows, as `split` says."""

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        value = student.new_zeros(student.shape[0])
        for weight, objective, index in self._parts(rows, student.device):
            theirs = None
            if teacher is not None:
                theirs = teacher[rows.teacher_index(index, teacher.device).device]
            value[index.device] = weight * objective.token_values(student[index.device], theirs, rows[index])
        return value

    def per_token_sparse(self, student: Tensor, compact: SparseLogprobs, rows: Rows) -> Tensor:
        value = student.new_zeros(student.shape[0])
        for weight, objective, index in self._parts(rows, student.device):
            here, inside = index.device, replace(rows[index], compact=compact[index.device])
            value[here] = weight * objective.token_values(student[here], None, inside)
        return value

    def per_sequence(self, rows: Rows) -> Tensor:
        assert rows.student_logprobs is not None
        value = torch.zeros_like(rows.student_logprobs)
        for weight, objective, index in self._parts(rows, value.device):
            inside = objective.rows_of(rows[index])
            value[index.device] = weight * objective.per_sequence(inside)
        return value

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        some = next(iter(student.values()))
        value = some.new_zeros(some.shape[0])
        for weight, objective, index in self._parts(rows, some.device):
            if objective.depths:
                theirs = rows.teacher_index(index, some.device).device
                ours = {depth: states[index.device] for depth, states in student.items()}
                others = {depth: states[theirs] for depth, states in teacher.items()}
                value[index.device] = weight * objective.per_layers(ours, others, rows[index])
        return value

    def _parts(self, rows: Rows, device: torch.device) -> list[tuple[float, Objective, RowIndex]]:
        """`split`, with the rows on a device."""
        return [
            (weight, objective, RowIndex.of(index, device))
            for weight, objective, index in self.split(rows)
            if index is not None
        ]


@register
class BySource(_Routed):
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

    def teachers_of(self, source: str, teacher: str | None = None) -> frozenset[str]:
        objective = self.for_source(source)
        return frozenset() if objective is None else objective.teachers_of(source, teacher)

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
        for code in np.unique(rows.sources):
            source = SOURCES[code]
            if source not in mapped:
                raise ValueError(
                    f"rows of source {source!r} came, but the objective maps {', '.join(mapped)}. "
                    f"Add objective.{source}, or change responses so that no such text is drawn"
                )
            objective = mapped[source]
            parts.append((objective.loss_weight, objective, rows.of_source(source)))
        return parts

    def held(self) -> tuple[Objective, ...]:
        return tuple(self.mapped().values())


@register
class ByTeacher(_Routed):
    """Another teacher for each row of the data set, which names it in its column `teacher`.

    Equation: w_m L_m on the rows that name teacher m, w_m the `loss_weight` of its objective, which compares
        with m.
    Gradient: that of the row's objective.
    Character: that of the row's objective.
    When: teachers of one domain each, such as mathematics to one and code to another.
    Source: the routing is ours.
    """

    kind: Literal["by_teacher"] = "by_teacher"
    objectives: dict[str, ObjectiveField] = Field(min_length=1)
    """The objective of each teacher, by its name under `teachers`; `main` is the one under `teacher`."""

    @field_validator("objectives")
    @classmethod
    def _compared_with_it(cls, objectives: dict[str, Objective]) -> dict[str, Objective]:
        return {name: objective.with_teacher(name) for name, objective in objectives.items()}

    def requirements(self) -> Requirements:
        return super().requirements() | Requirements(rows=frozenset({"teachers"}))

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        for name, objective in self.objectives.items():
            yield from objective.check_in_run(f"{path}.objectives.{name}", facts)

    def teachers_of(self, source: str, teacher: str | None = None) -> frozenset[str]:
        objective = self.objectives.get(teacher or "")
        return frozenset() if objective is None else objective.teachers_of(source)

    def split(self, rows: Rows) -> list[Split]:
        if rows.teachers is None:
            raise ValueError("an objective per teacher needs the name of the teacher of every row")
        parts: list[Split] = []
        for name in np.unique(rows.teachers).tolist():
            if name not in self.objectives:
                raise ValueError(
                    f"rows name the teacher {name!r}, but the objective maps {', '.join(self.objectives)}. "
                    f"Add objective.objectives.{name}, or leave such rows out"
                )
            objective = self.objectives[name]
            parts.append((objective.loss_weight, objective, np.flatnonzero(rows.teachers == name)))
        return parts

    def held(self) -> tuple[Objective, ...]:
        return tuple(self.objectives.values())

    def __hash__(self) -> int:
        return hash((self.kind, self.loss_weight, tuple(self.objectives.items())))
