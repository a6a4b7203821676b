"""What can be measured on a model: the interface of every measurement, and what it gets to work with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from stillhouse.config import Registry, StrictConfig
from stillhouse.core.journal import Journal
from stillhouse.data import DataConfig, DatasetConfig
from stillhouse.engines.base import EngineConfig, Sampling, TokenizerInfo
from stillhouse.models import fingerprint

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Bench:
    """One system that is being evaluated, with everything that a measurement may use."""

    system: str
    """"teacher", "student before", "student after" or another name."""
    model: nn.Module
    teacher: nn.Module | None
    """The model to compare with; None where the system is the teacher, or there is none."""
    tokenizer: Any
    facts: TokenizerInfo
    vocab: int
    """Number of token ids that both models share."""
    writer: EngineConfig
    """Which engine writes text with `model`."""
    data: DataConfig
    """Template and length rules of the run; a task may have its own."""
    sampling: Sampling
    """How answers are written where a task does not say; its length limit is set."""
    seeds: tuple[int, ...]
    held_out: DatasetConfig | None
    """The run's own held-out rows, for tasks without data."""
    limit: int | None = None
    """At most this many of the held-out rows, where a task has no limit of its own."""
    context: int | None = None
    """The most tokens that the model can take; None: nobody knows."""
    batch_size: int = 32
    """Sequences in one forward pass where likelihoods are measured."""
    title: str | None = None
    """Show progress under this title."""
    weights_of: Callable[[nn.Module], str] = fingerprint
    """A digest of a model's weights; a run reads each model once for all tasks of a system."""
    open_journal: Callable[[dict[str, Any], str], Journal] = lambda header, name: Journal(None, header)
    """Keeps pieces of work with such a header until the whole is done; by name where a measurement
    has several kinds of pieces."""

    def options(self) -> dict[str, Any]:
        """What `likelihood` needs to know besides the models."""
        return {"pad_id": self.facts.pad_id, "vocab": self.vocab, "batch_size": self.batch_size}

    @property
    def role(self) -> Literal["teacher", "student"]:
        """Whose answers these are."""
        return "teacher" if self.system.startswith("teacher") else "student"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a measurement.

    Example: `Outcome({"rouge_l": 24.1, "rouge_l_std": 0.3}, {"seeds": [10, 20]}, [{"id": "dolly:1", ...}])`
    """

    metrics: dict[str, Any]
    """Numbers by name; a list (the points of a curve) is kept but is no column of a table."""
    settings: dict[str, Any]
    """Everything that the metrics depend on, for the reader."""
    rows: list[dict[str, Any]]


RULES = {"template", "max_prompt", "max_response", "too_long", "no_response"}
"""What a result depends on in the `data` part of a run."""


class Probe(StrictConfig):
    """Something that is measured on one system. `Task` is the usual kind: questions with scored answers."""

    kind: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] | None = None
    """The task's name in files and tables; default: its kind, or the name of its data."""
    of_teacher: ClassVar[bool] = True
    """Whether it can be measured on the teacher itself."""

    @property
    def title(self) -> str:
        """The name that files and tables use."""
        return self.name or self.kind

    def expanded(self) -> Sequence[Probe]:
        """The single measurements that it stands for."""
        return (self,)

    def sources(self) -> Mapping[str, DatasetConfig]:
        """The files it reads, by the name of their field; looked for before anything is loaded."""
        return {}

    @abstractmethod
    def measure(self, bench: Bench) -> Outcome:
        """Measure one system.

        Raises:
            StillhouseError: data or models are not as needed.
        """

    def header(self, bench: Bench) -> dict[str, Any]:
        """What a result depends on: equal headers, equal results."""
        return {
            "task": self.model_dump(mode="json"),
            "data": {name: source.fingerprint() for name, source in self.sources().items()},
            "weights": bench.weights_of(bench.model),
            "teacher": None if bench.teacher is None else bench.weights_of(bench.teacher),
            "sampling": bench.sampling.model_dump(mode="json"),
            "seeds": list(bench.seeds),
            "held_out": None if bench.held_out is None else bench.held_out.fingerprint(),
            "limit": bench.limit,
            "rules": bench.data.model_dump(mode="json", include=RULES),
        }


REGISTRY: Registry[Probe] = Registry("task", Probe)  # type: ignore[type-abstract]
TaskField = Annotated[SerializeAsAny[Probe], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds a task."""
