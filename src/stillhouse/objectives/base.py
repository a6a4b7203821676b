"""What every objective is: a frozen part that turns logits into one number per row, in nats per token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self, TypeVar

import torch
from pydantic import BeforeValidator, SerializeAsAny, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from stillhouse.config import Layer, Layered, Registry, StrictConfig, nearest, validate, walk
from stillhouse.core.host import Ints, known
from stillhouse.core.requirements import LOGPROBS, MAIN, Granularity, Requirements, RunFacts
from stillhouse.core.rows import Rows, with_gaps
from stillhouse.core.sparse import EXCLUDED, SparseLogprobs, buckets, sampled_entries
from stillhouse.core.types import SOURCES, Progress
from stillhouse.errors import ConfigError, Fault
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
        teacher_logits: Tensor | SparseLogprobs | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """The value of each row, differentiable in the student only.

        Args:
            student_logits: [N, V]; half precision is raised to fp32. An entry that is -inf in either model
                takes no part: it is left out of both and the rest renormalised.
            teacher_logits: [N, V], or what the teacher says about a few tokens of each row; None if it
                needs no teacher.
            rows: labels, sources and the rest of what `requirements` names, [N] each.

        Returns:
            [N] nats per token.

        Raises:
            ValueError: something that it requires is missing, or shapes differ.
        """
        rows = rows or Rows()
        if isinstance(teacher_logits, SparseLogprobs):
            rows, teacher_logits = with_sparse(rows, teacher_logits), None
        self.check(teacher_logits is not None, rows)
        if rows.count not in (None, student_logits.shape[0]):
            raise ValueError(
                f"{self.name}: {student_logits.shape[0]} rows of logits but facts on {rows.count}"
            )
        student, teacher = _raised(student_logits), None
        if teacher_logits is not None and self.needs_teacher:
            teacher = _raised(teacher_logits).detach()
        names = [name for name in rows.model_logits if name in self.requirements().model_names]
        others = [rows.model_logits[name].detach().to(student.dtype) for name in names]
        if teacher is not None and self.shares_vocabulary and teacher.shape != student.shape:
            raise ValueError(
                f"{self.name}: student logits are {list(student.shape)} and teacher logits "
                f"{list(teacher.shape)}; cut both to the ids that the models share"
            )
        if teacher is not None:
            check_aligned(self, student.shape[0], teacher.shape[0], rows)
        student, teacher, *others = aligned(student, (teacher, *others), self.shares_vocabulary)
        rows = replace(rows, model_logits=dict(zip(names, others, strict=True)))
        if self.sequence_level:
            rows = with_logprobs(student, teacher, rows)
        value = self.token_values(student, teacher, rows)
        return value + self.per_sequence(self.rows_of(rows)) if self.has_sequence_part else value

    def teacher_of(self, teacher: Tensor | None, rows: Rows) -> Tensor | None:
        """[n, V]: the logits of its own teacher; `teacher`, the main one, unless it names another."""
        return teacher if self.teacher_model == MAIN else rows.model_logits.get(self.teacher_model)

    def rows_of(self, rows: Rows) -> Rows:
        """The rows with its own teacher's log-probabilities of the labels."""
        return rows if self.teacher_model == MAIN else rows.of_teacher(self.teacher_model)

    def token_values(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        """`per_token` or `per_token_sparse`, as its own teacher calls for; `teacher` is the main one."""
        if rows.compact is None or self.teacher_model != MAIN:
            return self.per_token(student, self.teacher_of(teacher, rows), self.rows_of(rows))
        return self.per_token_sparse(student, rows.compact, rows)

    @abstractmethod
    def per_token(self, student: Tensor, teacher: Tensor | None, rows: Rows) -> Tensor:
        """The definition: finite logits [n, V] in fp32 or fp64 to values [n]. Sees any subset of the rows."""

    def per_token_sparse(self, student: Tensor, compact: SparseLogprobs, rows: Rows) -> Tensor:
        """`per_token` from what a teacher says about a few tokens of each row.

        Over the most probable ones and the tail as one outcome it is `per_token` of the coarsened logits
        [n, K + 1]; from draws it is sum_k w_k `per_sample`.
        """
        if not self.needs_teacher or not self.has_token_part:
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
        if not self.needs_teacher or rows.compact is None:
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

    def requirements(self) -> Requirements:
        """What it must be given; by default its teacher's whole distribution over the student's token ids."""
        return self.compared_with("distribution")

    def compared_with(self, *signals: str, same_tokenizer: bool = True) -> Requirements:
        """The requirements of a comparison with the teacher.

        Args:
            signals: of "distribution", "topk" and "sampled" (see `core.sparse`): from any one of them the
                value can be computed. "topk" is for what stays meaningful with all improbable tokens as one
                outcome, "sampled" for expectations under the teacher, which `per_sample` gives.
            same_tokenizer: whether entry i of both models has to be the same token.
        """
        alike = {self.teacher_model} if same_tokenizer or self.teacher_model != MAIN else set()
        if self.teacher_model != MAIN:  # of further teachers only whole distributions are passed along
            signals = ("distribution",)
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

    def per_layers(self, student: Layers, teacher: Layers, rows: Rows) -> Tensor:
        """What hidden states of layers add to the value of each row, [N].

        Args:
            student: depth -> [N, Ds], differentiable.
            teacher: depth -> [M, Dt].
            rows: as for `per_token`, all of the micro-batch.
        """
        raise NotImplementedError(f"{self.name} compares no layers")

    def check(self, has_teacher: bool, rows: Rows) -> None:
        """Raise a ValueError that names everything required and not given."""
        needs = self.requirements()
        present = {
            "teacher": has_teacher or rows.compact is not None,
            "labels": rows.labels is not None,
            "sources": rows.sources is not None,
            "sequences": rows.sequence_ids is not None,
            "pairs": rows.pair_ids is not None,
            "sampled_logprobs": rows.sampled_logprobs is not None,
            "label_logprobs": True,
            "teachers": rows.teachers is not None,
            **{name: name in rows.model_logits or name in rows.others for name in needs.model_names - {MAIN}},
        }
        main = {"teacher"} if needs.asks(MAIN, *LOGPROBS) else set()
        wanted = needs.rows | (needs.model_names - {MAIN}) | main
        missing = sorted(name for name in wanted if not present[name])
        if missing:
            raise ValueError(f"{self.name} needs {', '.join(missing)}, which the rows do not have")
        if not main or rows.compact is None:
            return
        if rows.compact.form not in self.forms:
            raise ValueError(
                f"{self.name} cannot be computed from a teacher's {rows.compact.form}; it needs "
                f"{' or '.join(sorted(self.forms))}"
            )
        if self.sequence_level and rows.teacher_logprobs is None:
            raise ValueError(f"{self.name} needs the teacher's log-probability of each label")

    @model_validator(mode="after")
    def _teacher_is_asked(self) -> Self:
        asked = self.requirements().model_names
        if self.teacher_model not in {MAIN, *asked}:
            raise ValueError("teacher_model has no effect: nothing of this objective itself asks a teacher")
        return self


REGISTRY: Registry[Objective] = Registry("objective", Objective, "forward_kl")  # type: ignore[type-abstract]


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


TreeT = TypeVar("TreeT")


def each_objective(tree: TreeT, how: Callable[[Objective], Objective]) -> TreeT:
    """The tree of parts with every objective in it replaced by `how(objective)`."""
    changed: TreeT = walk(tree, lambda _, value: how(value) if isinstance(value, Objective) else value)
    return changed


ObjectiveField = Annotated[SerializeAsAny[Objective], BeforeValidator(parse_objective)]
"""The annotation of a config field that holds an objective in any of the accepted spellings."""


def aligned(student: Tensor, others: Sequence[Tensor | None], same_vocabulary: bool = True) -> Any:
    """Take entries that are -inf in one of several models out of all; on a CPU finite logits come back as
    they are.

    Over different vocabularies each model only loses its own.
    """
    logits = (student, *others)
    masks = [None if one is None else torch.isneginf(one.detach()) for one in logits]
    if same_vocabulary:
        present = [mask for mask in masks if mask is not None]
        masks = [torch.stack(present).any(0)] * len(logits)
    pairs = zip(logits, masks, strict=True)
    return [
        one if one is None or mask is None or known(mask.any()) is False else one.masked_fill(mask, EXCLUDED)
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
    expected = {"student": len(alignment.student_groups), "teacher": len(alignment.teacher_groups)}
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
    others = {name: label_logprobs(logits, rows.labels) for name, logits in rows.model_logits.items()}
    known = {**others, **rows.model_logprobs}
    return with_gaps(replace(rows, student_logprobs=ours, teacher_logprobs=theirs, model_logprobs=known))


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
