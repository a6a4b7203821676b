"""The interface of every evaluation task, and what a task gets to work with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from stillhouse.config import Registry, StrictConfig
from stillhouse.core.distributed import SINGLE_PROCESS, World
from stillhouse.core.journal import Journal
from stillhouse.core.requirements import MAIN, Requirements
from stillhouse.data import DataConfig, DatasetConfig
from stillhouse.engines.base import EngineConfig, Sampling, TokenizerInfo
from stillhouse.models import fingerprint

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class EvalContext:
    """The system under evaluation and the settings of the run, for any task."""

    system: str
    """"teacher", "student before", "student after" or another name."""
    model: nn.Module
    teacher: nn.Module | None
    """The model to compare with; None where the system is the teacher itself, or there is none."""
    tokenizer: Any
    tokenizer_info: TokenizerInfo
    vocab_size: int
    """Number of token ids that model and teacher share."""
    engine: EngineConfig
    """Builds the engine that generates with `model`."""
    data: DataConfig
    """Template and length rules of the run; a task may have its own."""
    sampling: Sampling
    """For tasks without their own; `max_tokens` is set."""
    seeds: tuple[int, ...]
    held_out: DatasetConfig | None
    """Held-out rows of the run, for tasks without `data`."""
    limit: int | None = None
    """At most this many of the held-out rows, where a task has no limit of its own."""
    context_length: int | None = None
    """Maximum number of tokens of the model; None if unknown."""
    batch_size: int = 32
    """Sequences per forward pass where likelihoods are measured."""
    title: str | None = None
    """Show progress under this title."""
    fingerprint: Callable[[nn.Module], str] = fingerprint
    """A digest of a model's weights; a run computes it once per model for all tasks."""
    open_journal: Callable[[dict[str, Any], str], Journal] = lambda header, name: Journal(None, header)
    """Opens the journal of pieces that depend on `header`, by name where a task has several."""

    world: World = SINGLE_PROCESS
    """The processes that share the work; only the first one's result is written."""

    def likelihood_options(self) -> dict[str, Any]:
        """Keyword arguments of `likelihood` besides the models."""
        return {
            "pad_id": self.tokenizer_info.pad_id,
            "vocab_size": self.vocab_size,
            "batch_size": self.batch_size,
            "world": self.world,
        }

    @property
    def role(self) -> Literal["teacher", "student"]:
        """Whose responses these are."""
        return "teacher" if self.system.startswith("teacher") else "student"


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a task measured on one system.

    Example: `TaskResult({"rouge_l": 24.1}, {"seeds": [10, 20]}, [{"id": "dolly:1", ...}])`
    """

    metrics: dict[str, Any]
    """Values by name; lists (the points of a curve) are kept but are no columns of a table."""
    settings: dict[str, Any]
    """Everything that the metrics depend on, for the reader."""
    rows: list[dict[str, Any]]
    """One for each response."""


RELEVANT_DATA_FIELDS = {"template", "max_prompt", "max_response", "too_long", "no_response"}
"""Fields of `data` that the result of a task depends on."""


class EvalTask(StrictConfig):
    """Anything that `evaluate.tasks` can hold: it measures one system.

    `ScoredTask` is the usual kind: prompts with scored responses.
    """

    kind: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] | None = None
    """The task's name in files and tables; default: its kind, or the name of its data."""
    measures_time: ClassVar[bool] = False
    """Whether its result is a time. Of several processes the first one then measures while the others wait:
    neighbours at work would be measured too."""

    @property
    def title(self) -> str:
        """The name in files and tables."""
        return self.name or self.kind

    def requirements(self) -> Requirements:
        """What it needs beyond the system under evaluation."""
        return Requirements()

    @property
    def applies_to_teacher(self) -> bool:
        """Whether the teacher itself can be evaluated: not where the task needs its weights too."""
        return not self.requirements().asks(MAIN, "weights")

    def expanded(self) -> Sequence[EvalTask]:
        """The tasks that it stands for, each with a result of its own."""
        return (self,)

    def datasets(self) -> Mapping[str, DatasetConfig]:
        """The files it reads, by the name of their field; checked before anything is loaded."""
        return {}

    def check_sampling(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        """Refuse sampling that gives no meaningful result, before anything is loaded.

        Args:
            sampling: that of the run, for a task without its own.
            seeds: likewise.

        Raises:
            ValueError: with the way out.
        """

    @abstractmethod
    def evaluate(self, context: EvalContext) -> TaskResult:
        """Evaluate one system.

        Raises:
            StillhouseError: data or models do not suit the task.
        """

    def dependencies(self, context: EvalContext) -> dict[str, Any]:
        """Everything that the result depends on: a result with equal dependencies is not computed again."""
        return {
            "task": self.model_dump(mode="json"),
            "data": {name: dataset.fingerprint() for name, dataset in self.datasets().items()},
            "weights": context.fingerprint(context.model),
            "teacher": None if context.teacher is None else context.fingerprint(context.teacher),
            "sampling": context.sampling.model_dump(mode="json"),
            "seeds": list(context.seeds),
            "held_out": None if context.held_out is None else context.held_out.fingerprint(),
            "limit": context.limit,
            "rules": context.data.model_dump(mode="json", include=RELEVANT_DATA_FIELDS),
        }


REGISTRY: Registry[EvalTask] = Registry("task", EvalTask, "instructions")  # type: ignore[type-abstract]
TaskField = Annotated[SerializeAsAny[EvalTask], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds a task."""
