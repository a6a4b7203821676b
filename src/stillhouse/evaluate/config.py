"""The `evaluate` part of a run's configuration."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from stillhouse.config import ListOf, StrictConfig
from stillhouse.data.datasets import DatasetField
from stillhouse.engines.base import Sampling
from stillhouse.evaluate.tasks import EvalTask, TaskField


class EvaluateConfig(StrictConfig):
    """How teacher and student are evaluated: on held-out prompts and on tasks."""

    data: DatasetField | None = None
    """Held-out prompts with references; default: data.valid."""
    sampling: Sampling = Sampling(temperature=0.0)
    """How responses are sampled; temperature 0 is greedy. `max_tokens` is data.max_response unless set."""
    seeds: ListOf[int] = (10,)
    """One pass over the prompts for each. Greedy decoding needs one; the papers take five, sampled."""
    batch_size: int = Field(32, ge=1)
    """Sequences per forward pass where likelihoods are measured."""
    limit: int | None = Field(None, ge=1)
    """At most this many held-out prompts, also of tasks without rows of their own."""
    valid_limit: int | None = Field(100, ge=1)
    """At most this many prompts of data.valid for validation during training."""
    before: bool = True
    """Also evaluate the student before training."""
    teacher: bool = True
    """Also evaluate the teacher."""
    tasks: ListOf[TaskField] = ()
    """Tasks for every system, by kind or with options, such as
    [instructions, {kind: exact_match, data: rows.jsonl}]."""

    def expanded_tasks(self) -> tuple[EvalTask, ...]:
        """The tasks, with each that stands for several replaced by these."""
        return tuple(single for task in self.tasks for single in task.expanded())

    @model_validator(mode="after")
    def _unique_titles(self) -> Self:
        titles = [task.title for task in self.expanded_tasks()]
        duplicates = sorted({title for title in titles if titles.count(title) > 1})
        if duplicates:
            raise ValueError(
                f"two tasks are called {', '.join(duplicates)}; give each a name of its own (name: ...)"
            )
        return self

    @model_validator(mode="after")
    def _check_sampling_of_tasks(self) -> Self:
        for task in self.expanded_tasks():
            task.check_sampling(self.sampling, self.seeds)
        return self
