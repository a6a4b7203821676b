"""What every objective is: a frozen part that turns logits into one number per row, in nats per token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError
from torch import Tensor

from stillhouse.config import Layer, Layered, Registry, StrictConfig, nearest, validate
from stillhouse.core.rows import Rows, with_gaps
from stillhouse.core.sparse import ALL_FORMS, EXCLUDED, SparseLogprobs, buckets, sampled_entries
from stillhouse.core.types import SOURCES
from stillhouse.errors import ConfigError, Fault
from stillhouse.schedules import NonNegative

Split = tuple[float, "Objective", Tensor | None]
"""A weight, the objective it multiplies, and the rows it is for (None: all of them)."""


Layers = Mapping[float, Tensor]
"""Hidden states by depth."""


class Objective(StrictConfig):
    """Compares student and teacher row by row. `objective(student_logits, teacher_logits, rows)` gives [N]
    values.

    Writing one: fields, `kind`, `needs`, and `per_token`; nothing else. The fused path, the laws, YAML and
    the documentation follow from them. `value_and_gradient` may be given in closed form where that pays.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    """What it must be given: teacher, reference, labels, sources, sequences, pairs, sampled_logprobs,
    positions."""
    divergence: ClassVar[bool] = True
    """True if the value is never negative, and zero if and only if student and teacher agree."""
    shift_invariant: ClassVar[bool] = True
    """True if a constant added to all logits of a row changes nothing."""
    same_vocabulary: ClassVar[bool] = True
    """True if entry i of both models has to be the same token."""
    whole: ClassVar[Literal["row", "group", "sequence"]] = "row"
    """What `per_token` must see all of where the tokenizers differ, or wherever it is "sequence"."""
    mixes_rows: ClassVar[bool] = False
    """True if the value of a row depends on the student's logits of other rows of the same `whole`."""
    teacher_forms: ClassVar[frozenset[str]] = frozenset({"distribution"})
    """What it can be computed from where it needs the teacher: of "distribution", "topk" and "sampled" (see
    `core.sparse`). "topk" is for what stays meaningful with all improbable tokens as one outcome,
    "sampled" for expectations under the teacher, which `per_sample` gives."""

    exact_gradient: ClassVar[bool] = True
    """False if parts of the value are constants for the gradient, which then is not that of the number."""
    has_token_part: ClassVar[bool] = True
    """False if `per_token` is zero, so that the fused path may leave it out."""
    has_sequence_part: ClassVar[bool] = False
    """True if `per_sequence` is not zero."""

    loss_weight: NonNegative = 1.0
    """How much this term counts within a `sum` or a map from source to objective. Not part of its own
    value."""

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | SparseLogprobs | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """The value of each row, differentiable in the student only.

        Args:
            student_logits: [N, V]; half precision is raised to fp32. An entry that is -inf in either model
                takes no part: it is left out of both and the rest renormalised.
            teacher_logits: [N, V], or what the teacher says about a few tokens of each row; None if `needs`
                does not name the teacher.
            rows: labels, sources and the rest of what `needs` names, [N] each.

        Returns:
            [N] nats per token.

        Raises:
            ValueError: something that `needs` names is missing, or shapes differ.
        """
        rows = rows or Rows()
        if isinstance(teacher_logits, SparseLogprobs):
            rows, teacher_logits = with_sparse(rows, teacher_logits), None
        self.check(teacher_logits is not None, rows)
        if rows.count not in (None, student_logits.shape[0]):
            raise ValueError(
                f"{self.name}: {student_logits.shape[0]} rows of logits but facts on {rows.count}"
            )
        student, teacher, reference = _raised(student_logits), None, None
        if teacher_logits is not None and "teacher" in self.required:
            teacher = _raised(teacher_logits).detach()
        if rows.reference_logits is not None and "reference" in self.required:
            reference = rows.reference_logits.detach().to(student.dtype)
        if teacher is not None and self.shares_vocabulary and teacher.shape != student.shape:
            raise ValueError(
                f"{self.name}: student logits are {list(student.shape)} and teacher logits "
                f"{list(teacher.shape)}; cut both to the ids that the models share"
            )
        if teacher is not None:
            check_aligned(self, student.shape[0], teacher.shape[0], rows)
        student, *others = aligned(student, (teacher, reference), self.shares_vocabulary)
        teacher, reference = others
        if reference is not None:
            rows = replace(rows, reference_logits=reference)
        if self.sequence_level:
            rows = with_logprobs(student, teacher, rows)
        if rows.compact is None:
            value = self.per_token(student, teacher, rows)
        else:
            value = self.per_token_sparse(student, rows.compact, rows)
        return value + self.per_sequence(rows) if self.has_sequence_part else value

    @abstractmethod
    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        """The definition: finite logits [n, V] in fp32 or fp64 to values [n]. Sees any subset of the rows."""

    def per_token_sparse(self, student: Tensor, compact: SparseLogprobs, rows: Rows) -> Tensor:
        """`per_token` from what a teacher says about a few tokens of each row.

        Over the most probable ones and the tail as one outcome it is `per_token` of the coarsened logits
        [n, K + 1]; from draws it is sum_k w_k `per_sample`.
        """
        if "teacher" not in self.required or not self.has_token_part:
            return self.per_token(student, None, rows)
        if compact.form == "topk":
            return self.per_token(*buckets(student, compact), rows)
        log_p, log_q, weights = sampled_entries(student, compact)
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

    def value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Values [n] and the gradient of their sum [n, V]. Both arguments are scratch: they may be
        overwritten."""
        return _differentiated(student, lambda leaf: self.per_token(leaf, teacher, rows))

    def sparse_value_and_gradient(
        self, student: Tensor, teacher: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """As `value_and_gradient`, with `rows.compact` as the teacher."""
        if "teacher" not in self.required or rows.compact is None:
            return self.value_and_gradient(student, teacher, rows)
        compact = rows.compact
        return _differentiated(student, lambda leaf: self.per_token_sparse(leaf, compact, rows))

    def split(self, rows: Rows) -> list[Split]:
        """Which objective is for which rows; itself for all of them unless it is a map from source to
        objective."""
        return [(1.0, self, None)]

    @property
    def name(self) -> str:
        """Its `kind`."""
        return str(getattr(self, "kind", type(self).__name__))

    @property
    def required(self) -> frozenset[str]:
        """`needs` of this object; objectives that hold others override it."""
        return self.needs

    @property
    def shares_vocabulary(self) -> bool:
        """Whether it compares entry i with entry i of another model: `same_vocabulary`, if there is one."""
        return self.same_vocabulary and bool(self.required & {"teacher", "reference"})

    @property
    def forms(self) -> frozenset[str]:
        """`teacher_forms` of this object; every form if it needs no teacher. Objectives that hold others
        override it."""
        return self.teacher_forms if "teacher" in self.required else ALL_FORMS

    @property
    def depths(self) -> tuple[float, ...]:
        """The layers whose hidden states `per_layers` compares, as shares of the model's depth."""
        return ()

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        """What hidden states of layers add to the value of each row, [N].

        Args:
            student: depth -> [N, Ds], differentiable.
            teacher: depth -> [M, Dt].
            rows: as for `per_token`, all of the micro-batch.
        """
        raise NotImplementedError(f"{self.name} compares no layers")

    @property
    def sequence_level(self) -> bool:
        """True if a value depends on more than its own row, so that label log-probabilities come first."""
        return bool(self.required & {"sequences", "pairs"})

    def check(self, has_teacher: bool, rows: Rows) -> None:
        """Raise a ValueError that names everything `required` and not given."""
        present = {
            "teacher": has_teacher or rows.compact is not None,
            "reference": rows.reference_logits is not None or rows.reference_hidden is not None,
            "labels": rows.labels is not None,
            "sources": rows.sources is not None,
            "sequences": rows.sequence_ids is not None,
            "pairs": rows.pair_ids is not None,
            "sampled_logprobs": rows.sampled_logprobs is not None,
            "positions": rows.positions is not None,
        }
        missing = sorted(name for name in self.required if not present[name])
        if missing:
            raise ValueError(f"{self.name} needs {', '.join(missing)}, which the rows do not have")
        if "teacher" not in self.required or rows.compact is None:
            return
        if rows.compact.form not in self.forms:
            raise ValueError(
                f"{self.name} cannot be computed from a teacher's {rows.compact.form}; it needs "
                f"{' or '.join(sorted(self.forms))}"
            )
        if self.sequence_level and rows.teacher_logprobs is None:
            raise ValueError(f"{self.name} needs the teacher's log-probability of each label")


REGISTRY: Registry[Objective] = Registry("objective", Objective)  # type: ignore[type-abstract]


def build(kind: str, **options: Any) -> Objective:
    """The objective of that name. Example: `build("skew_kl", alpha=0.1)(student_logits, teacher_logits)`.

    Raises:
        ConfigError: no objective has that name, or an option is wrong.
    """
    if kind not in kinds():
        problem = f"no objective is called {kind!r}{nearest(kind, kinds())}"
        raise ConfigError(Fault("kind", problem, allowed=", ".join(kinds())))
    return validate(REGISTRY[kind], Layered.merged(Layer.of(options, "keyword")))[0]


def kinds() -> tuple[str, ...]:
    """All names that `build` knows."""
    return REGISTRY.kinds()


def parse_objective(value: Any) -> Objective:
    """Accept `{kind: ...}`, or a map from source to objective, which is short for `{kind: by_source,
    ...}`."""
    if isinstance(value, Mapping) and "kind" not in value and value:
        unknown = [key for key in value if key not in SOURCES]
        if unknown and len(unknown) == len(value):
            return REGISTRY.parse(value)  # no source at all: the message about the missing kind fits
        if unknown:
            raise PydanticCustomError(
                "objective_source",
                "no source is called {source}{near}; allowed: {allowed}",
                {
                    "source": repr(unknown[0]),
                    "near": nearest(str(unknown[0]), SOURCES),
                    "allowed": ", ".join(SOURCES),
                },
            )
        value = {"kind": "by_source", **value}
    return REGISTRY.parse(value)


ObjectiveField = Annotated[SerializeAsAny[Objective], BeforeValidator(parse_objective)]
"""The annotation of a config field that holds an objective in any of the accepted spellings."""


def aligned(student: Tensor, others: Sequence[Tensor | None], same_vocabulary: bool = True) -> Any:
    """Take entries that are -inf in one of several models out of all; finite logits come back as they are.

    Over different vocabularies each model only loses its own.
    """
    logits = (student, *others)
    masks = [None if one is None else torch.isneginf(one.detach()) for one in logits]
    if same_vocabulary:
        present = [mask for mask in masks if mask is not None]
        masks = [torch.stack(present).any(0)] * len(logits)
    pairs = zip(logits, masks, strict=True)
    return [
        one.masked_fill(mask, EXCLUDED) if one is not None and mask is not None and mask.any() else one
        for one, mask in pairs
    ]


def check_aligned(objective: Objective, ours: int, theirs: int, rows: Rows) -> None:
    """Raise a ValueError if the rows of two models cannot be compared by this objective."""
    alignment = rows.alignment
    if alignment is None:
        if theirs != ours:
            raise ValueError(f"teacher: {theirs} rows, but the student has {ours}")
        return
    if alignment.matching is not None and objective.shares_vocabulary:
        raise ValueError(
            f"{objective.name} compares token with token, which models with different tokenizers do not "
            "share; use objective uld, span or transport"
        )
    expected = {"student": alignment.student_groups.shape[0], "teacher": alignment.teacher_groups.shape[0]}
    for name, got in (("student", ours), ("teacher", theirs)):
        if got != expected[name]:
            raise ValueError(f"{name}: {got} rows, but {expected[name]} are aligned")
    if rows.labels is None:
        raise ValueError(f"{objective.name}: aligned rows need labels")


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label], [N] nats."""
    return logits.gather(-1, labels[:, None]).squeeze(-1) - logits.logsumexp(-1)


def with_sparse(rows: Rows, compact: SparseLogprobs) -> Rows:
    """Rows with a compact teacher, and with what it says about labels."""
    known = rows.teacher_logprobs if compact.labels is None else compact.labels
    return replace(rows, compact=compact, teacher_logprobs=known)


def with_logprobs(student: Tensor, teacher: Tensor | None, rows: Rows) -> Rows:
    """Rows with the label log-probabilities of both models filled in."""
    if rows.labels is None:
        raise ValueError("objectives over sequences need labels")
    theirs = rows.teacher_logprobs
    if theirs is None and teacher is not None:
        theirs = label_logprobs(teacher, rows.labels)
    ours = label_logprobs(student, rows.labels)
    return with_gaps(replace(rows, student_logprobs=ours, teacher_logprobs=theirs))


def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The number of `value` with the gradient of `surrogate`."""
    return value.detach() + surrogate - surrogate.detach()


ConfigT = TypeVar("ConfigT", bound=type[Objective])


def register(objective: ConfigT) -> ConfigT:
    """Add an objective to the registry under the default of its `kind`."""
    REGISTRY.register(objective)
    return objective


def _differentiated(student: Tensor, value_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Values and the gradient of their sum for the student's logits."""
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        value = value_of(leaf)
        if not value.requires_grad:
            return value, torch.zeros_like(student)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def _raised(logits: Tensor) -> Tensor:
    if logits.dim() != 2:
        raise ValueError(f"logits are [rows, vocabulary], got {list(logits.shape)}")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
