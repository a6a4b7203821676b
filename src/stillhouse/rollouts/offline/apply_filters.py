"""Filters over the sides of a round: who is dropped by which filter, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.core.requirements import Requirements
from stillhouse.rollouts.offline.filters.base import Around, Drop, Filter
from stillhouse.rollouts.offline.samples import Sample

MISSING = "missing"
"""The name under which places without a response are counted."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What filters say about the samples of one side.

    Example: `Verdicts(asked=3, dropped={1: ("empty", Drop("empty"))})`
    """

    asked: int
    dropped: Mapping[int, tuple[str, Drop]]
    """Place -> the filter that dropped it, and why. Places count from 0 in the order of the samples."""

    def counts(self) -> dict[str, dict[str, int]]:
        """How many each filter dropped, by reason."""
        return counted(self.dropped.values())


def judge(
    samples: Sequence[Sample], filters: Sequence[Filter], around: Around, side: str | None = None
) -> Verdicts:
    """Pass samples through filters in their order; a sample that is dropped is not shown to those behind.

    Args:
        samples: all responses of one side.
        filters: in order.
        around: what they may ask.
        side: "teacher" or "student": filters for the other side alone are left out.
    """
    dropped = {
        place: (MISSING, Drop("no response")) for place, sample in enumerate(samples) if sample.missing
    }
    for one in filters:
        if side is not None and one.sides not in ("all", side):
            continue
        places = [place for place in range(len(samples)) if place not in dropped]
        verdicts = one.judge([samples[place] for place in places], around)
        for place, drop in zip(places, verdicts, strict=True):
            if drop is not None:
                dropped[place] = (one.kind, drop)
    return Verdicts(len(samples), dropped)


def counted(drops: Any) -> dict[str, dict[str, int]]:
    """How many (filter, drop) there are, by filter and reason."""
    counts: dict[str, Counter[str]] = {}
    for name, drop in drops:
        counts.setdefault(name, Counter())[drop.reason] += 1
    return {name: dict(reasons) for name, reasons in counts.items()}


def requirements_of(filters: Sequence[Filter]) -> Requirements:
    """All that these filters need."""
    return Requirements.union(one.requirements() for one in filters)
