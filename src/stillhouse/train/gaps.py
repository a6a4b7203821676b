"""Likelihood gaps of whole optimiser steps, for objectives that set their alpha by them (DistiLLM-2).

A step's mean is over the sequences of all micro-batches and ranks, so no gradient depends on how the step is
split.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stillhouse.core.rows import Rows, sequence_gaps
from stillhouse.core.types import SOURCES

SIGNS = {"teacher": 1.0, "student": -1.0}
"""The direction that is to close: the teacher above the student on its own text, below it on the other."""


class Gaps:
    """Sums of the gaps of a step by who wrote the sequence."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(SOURCES), 2, dtype=torch.float64)

    def add(self, rows: Rows) -> None:
        """Add the sequences of a micro-batch; the rows have the label log-probabilities of both models."""
        gaps, sources = sequence_gaps(rows)
        facts = torch.stack([gaps.double(), torch.ones_like(gaps, dtype=torch.float64)], 1)
        self._sums.index_add_(0, sources.cpu(), facts.cpu())

    def means(self, add_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`teacher_gap` and `student_gap`, each where there are such sequences; empties the sums."""
        sums = add_over_ranks(self._sums)
        self._sums = torch.zeros_like(self._sums)
        found = {}
        for source, sign in SIGNS.items():
            total, count = sums[SOURCES.index(source)].tolist()
            if count:
                found[f"{source}_gap"] = sign * total / count
        return found
