"""What a part needs from the rest of a run, what the rest provides, and the comparison of the two.

Objectives, response policies, filters and schedules state `requirements()`; teachers, data and responses
state what they provide. `Requirements.missing` compares them without knowing any part by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

MAIN = "main"
"""The name of the model under `teacher:`."""
STUDENT = "student"
"""The name of the model that is trained."""
REFERENCE = "reference"
"""The usual name of a second teacher, such as the one before preference training."""


def teacher_path(name: str) -> str:
    """Where a configuration has the teacher of this name, and its key in models.json."""
    return "teacher" if name == MAIN else f"teachers.{name}"


Granularity = Literal["token", "group", "sequence"]
GRANULARITIES: tuple[Granularity, ...] = ("token", "group", "sequence")

SIGNALS = {
    "distribution": "whole distributions",
    "topk": "the most probable tokens and the mass of the rest",
    "sampled": "weighted random draws",
    "labels": "the log-probability of each token of the text",
    "layers": "hidden states of layers",
    "text": "generated text",
    "weights": "a model in this process",
}
"""What a model may provide, in words."""


@dataclass(frozen=True, slots=True)
class ModelNeed:
    """Any one of these signals from a named model.

    Example: `ModelNeed("main", frozenset({"distribution", "topk"}))`
    """

    model: str
    """The model's name under `teachers`; `main` is the one under `teacher`."""
    signals: frozenset[str]
    """Of `SIGNALS`; one of them is enough."""

    @property
    def words(self) -> str:
        """The signals in words, joined by "or"."""
        return " or ".join(words for name, words in SIGNALS.items() if name in self.signals)


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a part needs from the rest of a run; `a | b` is the union.

    Example: `Requirements.of("main", "distribution") | Requirements(rows=frozenset({"labels"}))`
    """

    models: frozenset[ModelNeed] = frozenset()
    rows: frozenset[str] = frozenset()
    """Facts on each response token: labels, sources, sequences, pairs, sampled_logprobs, rewards, teachers
    (that rows of the data set name), and label_logprobs (of the label under each model, which the fused path
    computes before the loss)."""
    data: frozenset[str] = frozenset()
    """What the data set or its settings must have: responses (of the data set), rejected (the other response
    of preference pairs), reasoning (before the answer of each response), evaluation_texts."""
    layers: frozenset[float] = frozenset()
    """Depths (0 to 1) at which hidden states of student and teacher are compared."""
    granularity: Granularity = "token"
    """What a value must see all of: one token, a group of aligned tokens, or a whole sequence."""
    batch_statistics: frozenset[str] = frozenset()
    """Statistics of a whole step: likelihood_gaps (with its loss), mean_likelihood_gaps (before it)."""
    measured: frozenset[str] = frozenset()
    """What has to be measured during training: dev_loss, train_loss, teacher_gap, student_gap."""
    same_tokenizer: frozenset[str] = frozenset()
    """Models that must share the student's token ids."""

    def __or__(self, other: Requirements) -> Requirements:
        return Requirements(
            models=self.models | other.models,
            rows=self.rows | other.rows,
            data=self.data | other.data,
            layers=self.layers | other.layers,
            granularity=max(self.granularity, other.granularity, key=GRANULARITIES.index),
            batch_statistics=self.batch_statistics | other.batch_statistics,
            measured=self.measured | other.measured,
            same_tokenizer=self.same_tokenizer | other.same_tokenizer,
        )

    @classmethod
    def of(cls, model: str, *signals: str) -> Requirements:
        """Only one of `signals` from the named model."""
        return cls(models=frozenset({ModelNeed(model, frozenset(signals))}))

    @classmethod
    def union(cls, parts: Iterable[Requirements]) -> Requirements:
        """Everything that several parts need."""
        whole = cls()
        for part in parts:
            whole |= part
        return whole

    @property
    def model_names(self) -> frozenset[str]:
        """The models that are needed."""
        return frozenset(need.model for need in self.models)

    def asks(self, model: str, *signals: str) -> bool:
        """Whether one of these signals is needed from this model."""
        wanted = frozenset(signals)
        return any(need.model == model and need.signals & wanted for need in self.models)

    def accepted(self, model: str) -> frozenset[str]:
        """The forms of log-probabilities that are enough for everything that needs them from `model`."""
        found = [need.signals for need in self.models if need.model == model and need.signals & LOGPROBS]
        return LOGPROBS.intersection(*found)

    def missing(self, given: Provisions) -> Requirements:
        """The part of this that is not given."""
        return Requirements(
            models=frozenset(
                need for need in self.models if not need.signals & given.models.get(need.model, frozenset())
            ),
            rows=self.rows - given.rows,
            data=self.data - given.data,
            measured=self.measured - given.measured,
        )


LOGPROBS = frozenset({"distribution", "topk", "sampled", "labels"})
"""The forms of a teacher's log-probabilities; see `core.sparse`."""

EVERY_ROW = frozenset({"labels", "sources", "sequences", "teachers", "label_logprobs"})
"""Facts that every batch has."""


@dataclass(frozen=True, slots=True)
class Provisions:
    """What teachers, data, responses and training give; the other side of `Requirements`.

    Example: `Provisions(models={"main": frozenset({"distribution", "text"})})`
    """

    models: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By name, of `SIGNALS`."""
    rows: frozenset[str] = EVERY_ROW
    data: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts about the run that a part may check, to refuse what only it knows to be wrong.

    Example: `RunFacts(sources=frozenset({"student"}), responses="on_policy", epochs=1.0, batch_size=32)`
    """

    sources: frozenset[str]
    """Who writes the text that the part is applied to: fixed, teacher, student, text, chosen, rejected."""
    responses: str
    """The kind of the response policy."""
    epochs: float
    batch_size: int
    max_steps: int | None = None
    sampling_teacher_share: float = 0.0
    """The teacher's share in the distribution that the student's text is sampled from."""
    altered_sampling: str = ""
    """The settings by which the student's text is drawn from another distribution than its own, in words."""
