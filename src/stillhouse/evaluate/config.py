"""What a configuration may say about evaluation."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from stillhouse.config import ListOf, StrictConfig
from stillhouse.data.datasets import DatasetField
from stillhouse.engines.base import Sampling
from stillhouse.evaluate.tasks import Probe, TaskField


class EvaluateConfig(StrictConfig):
    """How teacher and student are compared on held-out prompts."""

    data: DatasetField | None = None
    """Held-out prompts with references; default: data.valid."""
    sampling: Sampling = Sampling(temperature=0.0)
    """How answers are written; temperature 0 is greedy. The length limit is data.max_response unless set."""
    seeds: ListOf[int] = (10,)
    """One pass over the prompts for each; the papers take five at temperature 1. Greedy needs one."""
    batch_size: int = Field(32, ge=1)
    """Sequences in one forward pass when likelihoods are measured."""
    limit: int | None = Field(None, ge=1)
    """At most this many held-out prompts, also of tasks that have no rows of their own."""
    valid_limit: int | None = Field(100, ge=1)
    """At most this many prompts of data.valid when the student is validated during training."""
    before: bool = True
    """Also evaluate the student before training."""
    teacher: bool = True
    """Also evaluate the teacher."""
    tasks: ListOf[TaskField] = ()
    """What else is measured on every system: tasks by name, or with options, such as
    [instructions, {kind: exact_match, data: rows.jsonl}]."""

    def single_tasks(self) -> tuple[Probe, ...]:
        """The tasks, each that stands for several taken apart."""
        return tuple(one for task in self.tasks for one in task.expanded())

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [task.title for task in self.single_tasks()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"two tasks are called {', '.join(twice)}; give each a name of its own (name: ...)"
            )
        return self
