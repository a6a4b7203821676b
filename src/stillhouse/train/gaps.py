"""Likelihood gaps of whole optimiser steps, for objectives that set their alpha by them (DistiLLM-2).

A step's mean is over the sequences of all micro-batches and ranks, so no gradient depends on how the step is
split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.config import walk
from stillhouse.core.host import Ints, RowIndex
from stillhouse.core.requirements import MAIN
from stillhouse.core.rows import Rows, sequence_gaps
from stillhouse.core.types import SOURCES, Response
from stillhouse.objectives import Objective

SIGNS = {"teacher": 1.0, "student": -1.0}
"""The direction that is to close: the teacher above the student on its own text, below it on the other."""


@dataclass(frozen=True, slots=True)
class SequenceGaps:
    """The likelihood gaps of a micro-batch's sequences, not read yet."""

    values: Tensor
    """[S]"""
    sources: Ints
    """[S] who wrote each: an index into `SOURCES`."""

    @classmethod
    def of(cls, rows: Rows, teacher: str, responses: Sequence[Response]) -> SequenceGaps:
        """Of rows with the label log-probabilities of the student and of that teacher.

        Args:
            rows: of a micro-batch.
            teacher: its name.
            responses: of the micro-batch; those that are there a second time are left out.
        """
        values, sources = sequence_gaps(rows, teacher)
        counted = np.flatnonzero([not response.repeated for response in responses])
        return cls(RowIndex.of(counted).pick(values), sources[counted])


def gap_teacher(objective: Objective) -> str:
    """The teacher whose gaps to the student an objective follows."""
    found = [MAIN]

    def visit(_: str, value: Any) -> Any:
        if isinstance(value, Objective) and "likelihood_gaps" in value.requirements().batch_statistics:
            found.append(value.teacher_model)
        return value

    walk(objective, visit)
    return found[-1]


def gap_means(
    micro_batches: Sequence[SequenceGaps], add_over_ranks: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """`teacher_gap` and `student_gap` of a step, each where there are such sequences."""
    values = torch.cat([one.values.double() for one in micro_batches]).cpu()
    sources = torch.from_numpy(np.concatenate([one.sources for one in micro_batches]))
    sums = torch.zeros(len(SOURCES), 2, dtype=torch.float64)
    sums.index_add_(0, sources, torch.stack([values, torch.ones_like(values)], 1))
    sums = add_over_ranks(sums)
    found = {}
    for source, sign in SIGNS.items():
        total, count = sums[SOURCES.index(source)].tolist()
        if count:
            found[f"{source}_gap"] = sign * total / count
    return found
