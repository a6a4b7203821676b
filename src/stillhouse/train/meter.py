"""Sums of what happens between two rows of the metrics log; saved, so that a resumed log goes on exactly."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Adds up losses, tokens and seconds; `row` gives means and empties it.

    Plain sums (seconds, tokens) stay sums; means are kept as a total and a count.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)

    def add(self, name: str, value: float) -> None:
        """Add to a plain sum."""
        self._sums[f"sum:{name}"] += value

    def add_mean(self, name: str, total: float, count: float) -> None:
        """Add `total` over `count` units to a mean."""
        self._sums[f"top:{name}"] += total
        self._sums[f"bottom:{name}"] += count

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Add the wall-clock time of the block to `seconds/NAME`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"seconds/{name}", time.perf_counter() - start)

    def row(self) -> dict[str, float]:
        """Everything since the last row, which is emptied."""
        row = {}
        for name, value in self._sums.items():
            kind, _, key = name.partition(":")
            if kind == "sum":
                row[key] = value
            elif kind == "top" and self._sums[f"bottom:{key}"]:
                row[key] = value / self._sums[f"bottom:{key}"]
        self._sums.clear()
        return row

    def state_dict(self) -> dict[str, float]:
        """The sums so far."""
        return dict(self._sums)

    def load_state_dict(self, sums: dict[str, float]) -> None:
        """Put back what `state_dict` gave."""
        self._sums = defaultdict(float, sums)
