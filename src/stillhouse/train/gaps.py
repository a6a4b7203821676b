"""Likelihood gaps of whole optimiser steps, for objectives that set their alpha by them (DistiLLM-2).

A step's mean is over the sequences of all micro-batches and ranks, so no gradient depends on how the step is
split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from stillhouse.config import walk
from stillhouse.core.rows import Rows, sequence_gaps
from stillhouse.core.types import SOURCES, Progress
from stillhouse.objectives.contrastive import Contrastive

TreeT = TypeVar("TreeT")
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


def ruled(tree: Any) -> list[Contrastive]:
    """The objectives in a tree of parts that set their alpha by gaps."""
    found: list[Contrastive] = []

    def visit(_: str, value: Any) -> Any:
        if isinstance(value, Contrastive) and value.alpha_rule == "gap":
            found.append(value)
        return value

    walk(tree, visit)
    return found


def begun(tree: TreeT, progress: Progress) -> TreeT:
    """The tree with the rule switched off where its time has not come."""
    return _replaced(
        tree,
        lambda part: (
            part.model_copy(update={"alpha_rule": "fixed"}) if progress.epoch < part.rule_after else part
        ),
    )


def referred(tree: TreeT, means: dict[str, float]) -> TreeT:
    """The tree with the step's means in place of `batch`."""
    return _replaced(
        tree,
        lambda part: part.with_references(means.get("teacher_gap", 0.0), means.get("student_gap", 0.0)),
    )


def _replaced(tree: TreeT, how: Callable[[Contrastive], Contrastive]) -> TreeT:
    chosen = ruled(tree)
    replaced: TreeT = walk(
        tree, lambda _, value: how(value) if any(value is part for part in chosen) else value
    )
    return replaced
