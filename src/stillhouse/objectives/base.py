"""What every objective is: a frozen part that turns logits into one number per row, in nats per token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor

from stillhouse.config import StrictConfig
from stillhouse.core.host import Ints
from stillhouse.core.requirements import LOGPROBS, MAIN, Granularity, Requirements, RunFacts
from stillhouse.core.rows import Rows, Signal, TeacherRows
from stillhouse.core.sparse import SparseLogprobs, buckets, sampled_entries
from stillhouse.core.types import Progress
from stillhouse.errors import Fault
from stillhouse.objectives.kernels import KernelTerm
from stillhouse.objectives.logits import differentiated, raised, with_logprobs, without_excluded
from stillhouse.schedules import NonNegative

Split = tuple[float, "Objective", Ints | None]
"""A weight, the objective it multiplies, and the positions of the rows it is for (None: all of them)."""


Layers = Mapping[float, Tensor]
"""Hidden states by depth."""


class Objective(StrictConfig):
    """Compares student and teacher row by row. `objective(student_logits, teacher_logits, rows)` gives [N]
    values.

    Writing one: fields, `kind`, `per_token`, and `requirements` where more or less than the teacher's whole
    distribution is needed; nothing else. The fused path, the laws, YAML and the documentation follow from
    them. `value_and_gradient` may be given in closed form where that pays.
    """

    divergence: ClassVar[bool] = True
    """True if the value is never negative, and zero if and only if student and teacher agree."""
    shift_invariant: ClassVar[bool] = True
    """True if a constant added to all logits of a row changes nothing."""
    mixes_rows: ClassVar[bool] = False
    """True if the value of a row depends on the student's logits of other rows within its granularity."""
    exact_gradient: ClassVar[bool] = True
    """False if parts of the value are constants for the gradient, which then is not that of the number."""
    has_token_part: ClassVar[bool] = True
    """False if `per_token` is zero, so that the fused path may leave it out."""
    has_sequence_part: ClassVar[bool] = False
    """True if `per_sequence` is not zero."""

    teacher_model: str = MAIN
    """Which teacher it compares with: a name under `teachers`."""
    loss_weight: NonNegative = 1.0
    """How much this term counts within a `sum` or a map from source to objective. Not part of its own
    value."""

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Signal | Mapping[str, Signal] | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """The value of each row, differentiable in the student only.

        Args:
            student_logits: [N, V]; half precision is raised to fp32. An entry that is -inf in either model
                takes no part: it is left out of both and the rest renormalised.
            teacher_logits: [N, V], or what the teacher says about a few tokens of each row, or either of them
                by the name of the teacher; None if it needs no teacher.
            rows: labels, sources and the rest of what `requirements` names, [N] each.

        Returns:
            [N] nats per token.

        Raises:
            ValueError: something that it requires is missing, or shapes differ.
        """
        rows, needs = rows or Rows(), self.requirements()
        if rows.count not in (None, student_logits.shape[0]):
            raise ValueError(
                f"{self.name}: {student_logits.shape[0]} rows of logits but facts on {rows.count}"
            )
        student = raised(student_logits)
        signals = {name: one.signal for name, one in rows.teachers.items() if one.signal is not None}
        signals |= by_teacher(teacher_logits)
        signals = {name: signal for name, signal in signals.items() if name in needs.model_names}
        logits = {
            name: raised(signal).detach().to(student.dtype)
            for name, signal in signals.items()
            if isinstance(signal, Tensor)
        }
        known = {name: facts for name, facts in rows.teachers.items() if name in needs.model_names}
        rows = replace(rows, teachers=known).with_signals({**signals, **logits})
        self.check(rows, signals.keys())
        for name in logits.keys() & needs.same_tokenizer:
            if logits[name].shape != student.shape:
                raise ValueError(
                    f"{self.name}: student logits are {list(student.shape)} and logits of teacher {name} "
                    f"{list(logits[name].shape)}; cut both to the ids that the models share"
                )
        if MAIN in logits:
            check_aligned(self, student.shape[0], logits[MAIN].shape[0], rows)
        student, logits = without_excluded(student, logits, needs.same_tokenizer)
        rows = rows.with_signals(logits)
        if self.sequence_level:
            rows = self.with_sequence_facts(with_logprobs(student, rows))
        value = self.token_values(student, rows)
        return value + self.per_sequence(rows) if self.has_sequence_part else value

    def token_values(self, student: Tensor, rows: Rows) -> Tensor:
        """`per_token`, or `per_token_sparse` if its teacher says something about a few tokens only."""
        rows = self._compared_rows(rows)
        teacher = self._signal(rows)
        if isinstance(teacher, SparseLogprobs):
            return self.per_token_sparse(student, teacher, rows)
        value = self.per_token(student, teacher, rows)
        self._check_per_row(value, student)
        return value

    def token_values_and_gradient(self, student: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """As `token_values`, with the gradient of their sum [n, V]. The logits of the student and of its
        teacher are scratch: they may be overwritten."""
        rows = self._compared_rows(rows)
        teacher = self._signal(rows)
        if isinstance(teacher, SparseLogprobs):
            sparse = teacher
            return differentiated(student, lambda leaf: self.per_token_sparse(leaf, sparse, rows))
        return self.value_and_gradient(student, teacher, rows)

    def _signal(self, rows: Rows) -> Signal | None:
        """What its teacher says; None if it does not ask."""
        found = rows.teachers.get(self.teacher_model)
        return found.signal if found is not None and self.needs_teacher else None

    def _compared_rows(self, rows: Rows) -> Rows:
        """The rows as its teacher has them: the alignment is that of the main one."""
        if rows.alignment is None or self.teacher_model == MAIN:
            return rows
        teachers = {name: one for name, one in rows.teachers.items() if name != MAIN}
        return replace(rows, alignment=None, teachers=teachers)

    @abstractmethod
    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        """The definition: finite logits [n, V] in fp32 or fp64 to values [n]. Sees any subset of the rows.

        Args:
            student: its logits.
            teacher: those of its `teacher_model`.
            rows: facts on the rows.
        """

    def per_token_sparse(self, student: Tensor, teacher: SparseLogprobs, rows: Rows) -> Tensor:
        """`per_token` from what its teacher says about a few tokens of each row.

        Over the most probable ones and the tail as one outcome it is `per_token` of the coarsened logits
        [n, K + 1]; from draws it is sum_k w_k `per_sample`.
        """
        if not self.has_token_part:
            return self.per_token(student, None, rows)
        if teacher.form == "topk":
            return self.per_token(*buckets(student, teacher), rows)
        log_p, log_q, weights = sampled_entries(student, teacher)
        return (weights * self.per_sample(log_p, log_q)).sum(-1)

    def per_sample(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """f of an objective E_p[f] at drawn tokens: log-probabilities [n, K] of teacher and student to
        values."""
        raise NotImplementedError(f"{self.name} is no expectation under the teacher")

    def per_sequence(self, rows: Rows) -> Tensor:
        """What depends on whole sequences and is added to `per_token`; sees all rows at once.

        A function of `rows.student_logprobs` [N], through which its gradient flows.
        """
        assert rows.student_logprobs is not None
        return torch.zeros_like(rows.student_logprobs)

    def label_logprobs(self, rows: Rows) -> Tensor:
        """[N] nats: the log-probability of each label under its teacher."""
        found = rows.teachers[self.teacher_model].label_logprobs
        assert found is not None
        return found

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """`per_token`, and the gradient of its sum [n, V]. Both logits are scratch: they may be
        overwritten."""

        def value_of(leaf: Tensor) -> Tensor:
            value = self.per_token(leaf, teacher, rows)
            self._check_per_row(value, leaf)
            if self.has_token_part and not value.requires_grad:
                raise ValueError(
                    f"{self.name}: what per_token returns does not depend on the student's logits for the "
                    "gradient (detached, or computed without them), so that nothing would be learnt"
                )
            return value

        return differentiated(student, value_of)

    def _check_per_row(self, value: Tensor, student: Tensor) -> None:
        if value.shape != student.shape[:1]:
            raise ValueError(
                f"{self.name}: per_token returned values of shape {list(value.shape)} for logits of "
                f"{list(student.shape)}; it gives one value a row, [{student.shape[0]}], not averaged"
            )

    def kernel_terms(self, rows: Rows) -> tuple[KernelTerm, ...] | None:
        """What the Triton template adds up in the place of `per_token` for these rows; None if it cannot."""
        return None if self.has_token_part else ()

    @property
    def has_kernel(self) -> bool:
        """Whether the Triton template may compute something of it."""
        return type(self).kernel_terms is not Objective.kernel_terms or not self.has_token_part

    def split(self, rows: Rows) -> list[Split]:
        """Which objective is for which rows; itself for all of them unless it is a map from source to
        objective."""
        return [(1.0, self, None)]

    @property
    def name(self) -> str:
        """Its `kind`."""
        return str(getattr(self, "kind", type(self).__name__))

    def requirements(self) -> Requirements:
        """What it must be given; by default its teacher's whole distribution over the student's token ids."""
        return self.compared_with("distribution")

    def compared_with(self, *signals: str, same_tokenizer: bool = True) -> Requirements:
        """The requirements of a comparison with the teacher.

        Args:
            signals: of "distribution", "topk", "sampled" and "labels" (see `core.sparse`): from any one of
                them the value can be computed. "topk" is for what stays meaningful with all improbable tokens
                as one outcome, "sampled" for expectations under the teacher, which `per_sample` gives,
                "labels" for what depends on `label_logprobs` alone.
            same_tokenizer: whether entry i of both models has to be the same token.
        """
        alike = {self.teacher_model} if same_tokenizer or self.teacher_model != MAIN else set()
        return replace(Requirements.of(self.teacher_model, *signals), same_tokenizer=frozenset(alike))

    def check_in_run(self, path: str, facts: RunFacts) -> Iterator[Fault]:
        """What is wrong with it in this run beyond what `requirements` can say; nothing by default.

        Args:
            path: where it stands in the configuration.
            facts: the run; `sources` are those of the text that this objective is applied to.
        """
        return iter(())

    def for_source(self, source: str) -> Objective | None:
        """What applies to text of that source; itself unless it tells sources apart. None: nothing does."""
        return self

    def source_weight(self, source: str) -> float:
        """The weight that its values already hold for rows of that source."""
        return 1.0

    @property
    def sources(self) -> tuple[str, ...] | None:
        """The sources that it tells apart, each with a mean of its own; None: one mean over all text."""
        return None

    def teachers_of(self, source: str, teacher: str | None = None) -> frozenset[str]:
        """The models whose log-probabilities it needs for a sequence.

        Args:
            source: who wrote the sequence.
            teacher: the teacher that the sequence's row names, if it names one.
        """
        if self.for_source(source) is None:
            return frozenset()
        return frozenset(need.model for need in self.requirements().models if need.signals & LOGPROBS)

    def with_teacher(self, name: str) -> Objective:
        """The same compared with another teacher.

        Raises:
            ValueError: it asks no teacher itself.
        """
        return type(self).model_validate({**dict(self), "teacher_model": name})

    def at(self, progress: Progress) -> Objective:
        """As it applies at this point of the training; itself unless something in it begins later."""
        return self

    def with_batch_statistics(self, statistics: Mapping[str, float]) -> Objective:
        """With the step's `teacher_gap` and `student_gap`, where it asks for them before the loss."""
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether it asks a teacher for log-probabilities."""
        return any(need.signals & LOGPROBS for need in self.requirements().models)

    @property
    def other_models(self) -> frozenset[str]:
        """The models it compares with beside the main teacher."""
        return self.requirements().model_names - {MAIN}

    @property
    def forms(self) -> frozenset[str]:
        """The forms of the main teacher's log-probabilities from which it can be computed."""
        return self.requirements().accepted(MAIN)

    @property
    def shares_vocabulary(self) -> bool:
        """Whether it compares entry i with entry i of another model."""
        return bool(self.requirements().same_tokenizer)

    @property
    def granularity(self) -> Granularity:
        """What `per_token` must see all of where tokenizers differ, or wherever it is "sequence"."""
        return self.requirements().granularity

    @property
    def depths(self) -> tuple[float, ...]:
        """The layers whose hidden states `per_layers` compares, as shares of the model's depth."""
        return tuple(sorted(self.requirements().layers))

    @property
    def sequence_level(self) -> bool:
        """Whether the log-probabilities of the labels under each model come before its value."""
        return "label_logprobs" in self.requirements().rows

    @property
    def token_models(self) -> frozenset[str]:
        """The models whose logits its part over single tokens sees."""
        return self.requirements().model_names

    def with_sequence_facts(self, rows: Rows) -> Rows:
        """The rows with what it makes of the log-probabilities of whole sequences, before rows are divided.

        Args:
            rows: all of the micro-batch, with the log-probabilities of labels.
        """
        return rows

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        """What hidden states of layers add to the value of each row, [N].

        Args:
            student: depth -> [N, Ds], differentiable.
            teacher: depth -> [M, Dt].
            rows: as for `per_token`, all of the micro-batch.
        """
        raise NotImplementedError(f"{self.name} compares no layers")

    def check(self, rows: Rows, given: Collection[str]) -> None:
        """Raise a ValueError that names everything required and not given.

        Args:
            rows: facts, with what sparse teachers say.
            given: the teachers of which logits or hidden states, or sparse log-probabilities are there.
        """
        needs = self.requirements()
        present = {
            "labels": rows.labels is not None,
            "sources": rows.sources is not None,
            "sequences": rows.sequence_ids is not None,
            "pairs": rows.pair_ids is not None,
            "sampled_logprobs": rows.sampled_logprobs is not None,
            "rewards": rows.rewards is not None,
            "label_logprobs": True,
            "teachers": rows.teacher_names is not None,
        }
        missing = [name for name in needs.rows if not present[name]]
        asked = {need.model for need in needs.models if need.signals & LOGPROBS}
        missing += ["teacher" if name == MAIN else name for name in asked if name not in given]
        if missing:
            raise ValueError(f"{self.name} needs {', '.join(sorted(missing))}, which the rows do not have")
        for name in sorted(asked):
            facts = rows.teachers.get(name, TeacherRows())
            if not isinstance(facts.signal, SparseLogprobs):
                continue
            if facts.signal.form not in needs.accepted(name):
                raise ValueError(
                    f"{self.name} cannot be computed from a teacher's {facts.signal.form}; it needs "
                    f"{' or '.join(sorted(needs.accepted(name)))}"
                )
            if self.sequence_level and facts.label_logprobs is None:
                raise ValueError(f"{self.name} needs the teacher's log-probability of each label")

    @model_validator(mode="after")
    def _teacher_is_asked(self) -> Self:
        asked = self.requirements().model_names
        if self.teacher_model not in {MAIN, *asked}:
            raise ValueError("teacher_model has no effect: nothing of this objective itself asks a teacher")
        return self


def by_teacher(given: Any) -> dict[str, Any]:
    """What is given for one teacher as that for the main one; a mapping by name as it is."""
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else {MAIN: given}


def check_aligned(objective: Objective, ours: int, theirs: int, rows: Rows) -> None:
    """Raise a ValueError if the rows of two models cannot be compared by this objective."""
    alignment = rows.alignment
    if alignment is None:
        if theirs != ours:
            raise ValueError(f"teacher: {theirs} rows, but the student has {ours}")
        return
    if alignment.matching is not None and MAIN in objective.requirements().same_tokenizer:
        raise ValueError(
            f"{objective.name} compares token with token, which models with different tokenizers do not "
            "share; use objective uld, span or transport"
        )
    expected = {"student": len(alignment.student_groups), "teacher": len(alignment.teacher_groups)}
    for name, got in (("student", ours), ("teacher", theirs)):
        if got != expected[name]:
            raise ValueError(f"{name}: {got} rows, but {expected[name]} are aligned")
    if rows.labels is None:
        raise ValueError(f"{objective.name}: aligned rows need labels")
