"""One distribution made of several teachers', for any objective that compares with one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.core.requirements import MAIN, ModelNeed, Requirements, RunFacts
from stillhouse.core.rows import Rows, Signal, TeacherRows
from stillhouse.core.sparse import EXCLUDED, MIN_TAIL, SparseLogprobs, gathered_at, looked_up
from stillhouse.errors import Fault
from stillhouse.objectives.base import Objective
from stillhouse.objectives.combined import ObjectiveHolder
from stillhouse.objectives.divergences import log_softmax
from stillhouse.objectives.registry import ObjectiveField, register
from stillhouse.schedules import NonNegative


@register
class TeacherMixture(ObjectiveHolder):
    """Any loss against the mixture of several teachers' distributions.

    Equation: L(q, sum_m w_m p_m), w_m the `weights` over their sum, L the `objective`. Where a teacher gives
        its most probable tokens only, the mixture is known exactly at those that every such teacher names,
        and as one outcome for all others.
    Gradient: that of the objective.
    Character: that of the objective, with every mode of every teacher. A `sum` of losses with one teacher
        each has for forward KL the same gradient; for reverse KL its optimum is the geometric mean.
    When: teachers that are each right about another part of one text. For rows that belong to one teacher
        each take `by_teacher`.
    Source: an ensemble's averaged probabilities, as in Hinton et al. 2015 (arXiv 1503.02531), section 1.
    """

    kind: Literal["teacher_mixture"] = "teacher_mixture"
    weights: dict[str, NonNegative] = Field(min_length=2)
    """How much each teacher counts, by its name under `teachers`; `main` is the one under `teacher`. They are
    divided by their sum."""
    objective: ObjectiveField
    """What compares the student with the mixture."""

    @model_validator(mode="after")
    def _one_signal(self) -> Self:
        inner = self.objective.requirements()
        if len(inner.model_names) != 1 or not self.objective.needs_teacher:
            raise ValueError("objective has to compare with one teacher, in whose place the mixture stands")
        wrong = [
            words
            for words, found in (
                (
                    "tells sources or teachers of rows apart",
                    self.objective.sources or "teachers" in inner.rows,
                ),
                ("compares hidden states of layers", inner.layers),
                ("needs likelihood gaps, which are measured against one teacher", inner.batch_statistics),
                ("compares more than single tokens", inner.granularity != "token"),
            )
            if found
        ]
        if wrong:
            raise ValueError(f"objective {self.objective.name} {wrong[0]}; it cannot stand inside a mixture")
        if "teacher_model" in self.changed_fields() and self.teacher_model not in self.weights:
            raise ValueError("teacher_model has no effect: weights name the teachers")
        if all(weight == 0 for weight in self.weights.values()):
            raise ValueError("weights are all zero")
        return self

    def held(self) -> tuple[Objective, ...]:
        return (self.objective,)

    def requirements(self) -> Requirements:
        inner = self.objective.requirements()
        # Draws of one teacher say nothing about how probable another finds them.
        forms = inner.accepted(self._stands_for) - {"sampled"}
        needs = frozenset(ModelNeed(name, forms) for name in self.weights)
        return replace(inner, models=needs, same_tokenizer=frozenset(self.weights))

    @property
    def _stands_for(self) -> str:
        """The teacher that the objective asks."""
        return next(iter(self.objective.requirements().model_names), MAIN)

    @property
    def divergence(self) -> bool:  # type: ignore[override]
        """Of the mixture, which is none of its teachers."""
        return False

    def teachers_of(self, source: str, teacher: str | None = None) -> frozenset[str]:
        asks = self.objective.teachers_of(source, teacher)
        return frozenset(self.weights) if asks else frozenset()

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        yield from self.objective.check_in_run(f"{path}.objective", facts)

    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        return self.token_values(student, rows)

    def token_values(self, student: Tensor, rows: Rows) -> Tensor:
        return self.objective.token_values(student, self._with_mixture(rows, student.shape[-1]))

    def token_values_and_gradient(self, student: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        mixed = self._with_mixture(rows, student.shape[-1])
        return self.objective.token_values_and_gradient(student, mixed)

    def per_sequence(self, rows: Rows) -> Tensor:
        return self.objective.per_sequence(self._with_mixture(rows, 0))

    def _with_mixture(self, rows: Rows, vocab: int) -> Rows:
        """The rows with one teacher, the mixture of all, in place of the one that the objective asks."""
        total = sum(float(weight) for weight in self.weights.values())
        parts = [
            (math.log(float(weight) / total), rows.teachers[name])
            for name, weight in self.weights.items()
            if float(weight) > 0
        ]
        labels = [
            None if one.label_logprobs is None else log_weight + one.label_logprobs
            for log_weight, one in parts
        ]
        known = [one for one in labels if one is not None]
        label = torch.stack(known).logsumexp(0) if len(known) == len(parts) else None
        signals = [(log_weight, one.signal) for log_weight, one in parts if one.signal is not None]
        signal = mixture_of(signals, vocab, label) if len(signals) == len(parts) else None
        return replace(rows, teachers={self._stands_for: TeacherRows(signal, label)})

    def __hash__(self) -> int:
        return hash((self.kind, self.loss_weight, tuple(self.weights.items()), self.objective))


def mixture_of(parts: Sequence[tuple[float, Signal]], vocab: int, label: Tensor | None = None) -> Signal:
    """The mixture of several teachers' signals about the same rows.

    Args:
        parts: the log of each weight, and logits [n, V] or the most probable tokens or labels alone.
        vocab: V, where tokens are compared.
        label: [n], the mixture's log-probability of each label.

    Returns:
        Log-probabilities [n, V]; or over the tokens that all sparse teachers name, where one is sparse; or of
        the labels alone, where one gives no more.
    """
    sparse = [one for _, one in parts if isinstance(one, SparseLogprobs)]
    if any(one.form == "labels" for one in sparse):
        assert label is not None
        return SparseLogprobs.of_labels(label)
    if sparse:
        return _over_shared_tokens(parts, sparse[0], vocab, label)
    whole: Tensor | None = None
    for log_weight, logits in parts:
        assert isinstance(logits, Tensor)
        part = log_softmax(logits) + log_weight
        whole = part if whole is None else torch.logaddexp(whole, part)
    assert whole is not None
    return whole


def _over_shared_tokens(
    parts: Sequence[tuple[float, Signal]], first: SparseLogprobs, vocab: int, label: Tensor | None
) -> SparseLogprobs:
    """The mixture at the tokens that all sparse teachers name, and the mass of all others: both exact."""
    ids, shared = first.ids, (first.ids >= 0) & (first.ids < vocab)
    mixed: Tensor | None = None
    for log_weight, signal in parts:
        if isinstance(signal, Tensor):
            found = gathered_at(log_softmax(signal), ids)
        elif signal is first:
            found = signal.logprobs
        else:
            missing = signal.logprobs.new_full((len(signal), 1), EXCLUDED)
            found = looked_up(signal, ids, vocab, missing)
            shared = shared & (found > EXCLUDED)
        part = found + log_weight
        mixed = part if mixed is None else torch.logaddexp(mixed, part.to(mixed.dtype))
    assert mixed is not None
    mixed = mixed.masked_fill(~shared, EXCLUDED)
    rest = torch.log1p(-mixed.double().exp().sum(-1).clamp(max=1.0)).clamp_min(MIN_TAIL)
    return SparseLogprobs(ids.masked_fill(~shared, -1), mixed, tail=rest.to(mixed.dtype), labels=label)
