"""Worked examples before a question, for models that were not trained to follow instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from stillhouse.data import DatasetConfig, DatasetField
from stillhouse.errors import DataError
from stillhouse.evaluate.tasks.base import Task


class WithShots(Task):
    """A task whose prompt may begin with worked examples, and whose answer ends where another one begins."""

    shots: Annotated[int, Field(ge=0)] = 0
    """How many worked examples each prompt begins with: the first so many rows of `examples`."""
    examples: DatasetField | None = None
    """Where they are from; rows that are not asked."""

    @model_validator(mode="after")
    def _has_examples(self) -> Self:
        if self.shots and self.examples is None:
            raise ValueError("shots needs examples: a file of rows that are not asked")
        return self

    def sources(self) -> Mapping[str, DatasetConfig]:
        """Its rows and its examples."""
        return {**super().sources(), **({} if self.examples is None else {"examples": self.examples})}

    def worked(self) -> list[Mapping[str, Any]]:
        """The rows of the examples.

        Raises:
            DataError: there are fewer than `shots`.
        """
        if self.examples is None or not self.shots:
            return []
        rows: list[Mapping[str, Any]] = []
        for _, raw in self.examples.raw(Counter()):
            rows.append(raw)
            if len(rows) == self.shots:
                return rows
        raise DataError(f"{self.examples.path}: has {len(rows)} rows, and {self.shots} shots were asked for")
