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
from stillhouse.core.requirements import MAIN, Requirements, RunFacts
from stillhouse.core.rows import Rows, TeacherRows
from stillhouse.core.types import SOURCES
from stillhouse.errors import Fault
from stillhouse.objectives.base import Layers, Objective, Split
from stillhouse.objectives.kernels import KernelTerm
from stillhouse.objectives.logits import differentiated
from stillhouse.objectives.registry import ObjectiveField, register


class ObjectiveHolder(Objective):
    """What objectives that hold others have in common: they need what those need."""

    @abstractmethod
    def held(self) -> tuple[Objective, ...]:
        """The objectives inside."""

    def requirements(self) -> Requirements:
        return Requirements.union(part.requirements() for part in self.held())

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        return self.token_values(student, rows if teacher is None else rows.with_signals({MAIN: teacher}))

    @abstractmethod
    def token_values(self, student: Tensor, rows: Rows) -> Tensor: ...

    def token_values_and_gradient(self, student: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return differentiated(student, lambda leaf: self.token_values(leaf, rows))

    def with_sequence_facts(self, rows: Rows) -> Rows:
        for part in self.held():
            rows = part.with_sequence_facts(rows) if part.sequence_level else rows
        return rows

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
class Sum(ObjectiveHolder):
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

    def token_values(self, student: Tensor, rows: Rows) -> Tensor:
        parts = [term.loss_weight * term.token_values(student, rows) for term in self.terms]
        return torch.stack(parts).sum(0)

    @property
    def has_kernel(self) -> bool:
        return all(part.has_kernel for part in self.held())

    @property
    def token_models(self) -> frozenset[str]:
        return frozenset().union(*(term.token_models for term in self.terms if term.has_token_part))

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        found: list[KernelTerm] = []
        for term in self.terms:
            parts = term.kernel_terms(rows)
            if parts is None:
                return None
            found += [part.times(float(term.loss_weight)) for part in parts]
        return tuple(found)

    def token_values_and_gradient(self, student: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        value, gradient = student.new_zeros(student.shape[0]), None
        active = [term for term in self.terms if term.has_token_part]
        for left, term in zip(range(len(active) - 1, -1, -1), active, strict=True):
            # The last term may overwrite the logits themselves.
            scratch = (student.clone(), rows.cloned(term.teacher_model)) if left else (student, rows)
            part, slope = term.token_values_and_gradient(*scratch)
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
            if term.sources is not None:
                yield Fault(
                    f"{path}.terms[{number}]",
                    f"{term.name} takes a mean for each source of text, a sum one over all of it",
                    hint="Write one sum for each source: objective: {teacher: {kind: sum, terms: [...]}, "
                    "student: {kind: sum, terms: [...]}}.",
                )


class _Routed(ObjectiveHolder):
    """What objectives have in common that apply another one to each part of the rows, as `split` says."""

    @property
    def has_kernel(self) -> bool:
        return any(part.has_kernel for part in self.held())

    def token_values(self, student: Tensor, rows: Rows) -> Tensor:
        value = student.new_zeros(student.shape[0])
        for weight, objective, index in self._parts(rows):
            part = weight * objective.token_values(index.pick(student), rows[index])
            value[index.on(value.device)] = part
        return value

    def per_sequence(self, rows: Rows) -> Tensor:
        assert rows.student_logprobs is not None
        value = torch.zeros_like(rows.student_logprobs)
        for weight, objective, index in self._parts(rows):
            value[index.on(value.device)] = weight * objective.per_sequence(rows[index])
        return value

    def with_sequence_facts(self, rows: Rows) -> Rows:
        for _, objective, index in self._parts(rows):
            if objective.sequence_level:
                part = objective.with_sequence_facts(rows[index])
                rows = replace(rows, teachers=_with_agreement(rows, part, index))
        return rows

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        some = next(iter(student.values()))
        value = some.new_zeros(some.shape[0])
        for weight, objective, index in self._parts(rows):
            if objective.depths:
                theirs = rows.teacher_index(MAIN, index)
                ours = {depth: index.pick(states) for depth, states in student.items()}
                others = {depth: theirs.pick(states) for depth, states in teacher.items()}
                value[index.on(value.device)] = weight * objective.per_layers(ours, others, rows[index])
        return value

    def _parts(self, rows: Rows) -> list[tuple[float, Objective, RowIndex]]:
        return [(w, one, RowIndex.of(rows_of)) for w, one, rows_of in self.split(rows) if rows_of is not None]


def _with_agreement(rows: Rows, part: Rows, index: RowIndex) -> dict[str, TeacherRows]:
    """What teachers say about all rows, with what was made of some of them."""
    found = dict(rows.teachers)
    for name, one in part.teachers.items():
        if one.agreement is not None:
            known = found[name].agreement
            whole = one.agreement.new_ones(rows.count or 0) if known is None else known.clone()
            whole[index.on(whole.device)] = one.agreement
            found[name] = replace(found[name], agreement=whole)
    return found


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
    direct: ObjectiveField | None = None
    """For answers without their chain of thought."""
    chosen: ObjectiveField | None = None
    """For the chosen responses of preference pairs."""
    rejected: ObjectiveField | None = None
    """For the rejected responses of preference pairs."""

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
        if rows.teacher_names is None:
            raise ValueError("an objective per teacher needs the name of the teacher of every row")
        parts: list[Split] = []
        for name in np.unique(rows.teacher_names).tolist():
            if name not in self.objectives:
                raise ValueError(
                    f"rows name the teacher {name!r}, but the objective maps {', '.join(self.objectives)}. "
                    f"Add objective.objectives.{name}, or leave such rows out"
                )
            objective = self.objectives[name]
            parts.append((objective.loss_weight, objective, np.flatnonzero(rows.teacher_names == name)))
        return parts

    def held(self) -> tuple[Objective, ...]:
        return tuple(self.objectives.values())

    def __hash__(self) -> int:
        return hash((self.kind, self.loss_weight, tuple(self.objectives.items())))
