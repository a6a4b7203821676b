"""What is measured between two rows of the metrics log; saved, so that a resumed log continues exactly.

A row counts what all processes have done: sums and means over units go over all of them; seconds, which pass
for all at once, are those of the slowest.

Values stay tensors on their device until a row is written, and times marks in its queue: reading one earlier
would make the program wait for the device in every micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from stillhouse.train.device import HostClock, PhaseClock

SECONDS = "seconds/"


@dataclass(frozen=True, slots=True)
class Metric:
    """One measurement: a sum to add to, or a total over a number of units whose mean is logged.

    Example: `Metric(values.sum(), "mean", weight=values.numel())`
    """

    total: Tensor | float
    """A scalar."""
    reduction: Literal["sum", "mean"] = "sum"
    weight: float = 1.0
    """Of a mean: the number of units in `total`."""


class MetricAccumulator:
    """Adds up metrics; `row` gives sums and means, and empties it."""

    def __init__(self, clock: PhaseClock | None = None) -> None:
        """Empty.

        Args:
            clock: that of the device that does what is timed; default: the program's.
        """
        self._clock = clock or HostClock()
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, float] = {}
        self._spans: list[tuple[str, Any, Any]] = []
        """Times that have not been read: name, first mark, last mark."""

    def add(self, name: str, total: Tensor | float) -> None:
        """Add to a sum."""
        self.update({name: Metric(total)})

    def add_mean(self, name: str, total: Tensor | float, weight: float) -> None:
        """Add `total` over `weight` units to a mean."""
        self.update({name: Metric(total, "mean", weight)})

    def update(self, metrics: Mapping[str, Metric]) -> None:
        """Add several. Tensors are added up in float64 on their device, without a host sync."""
        for name, metric in metrics.items():
            total = metric.total.detach().double() if isinstance(metric.total, Tensor) else metric.total
            self._sums[name] = self._sums.get(name, 0.0) + total
            if metric.reduction == "mean":
                self._weights[name] = self._weights.get(name, 0.0) + metric.weight

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Add the time that the device takes for the block to `seconds/NAME`."""
        start = self.mark()
        try:
            yield
        finally:
            self.since(name, start)

    def mark(self) -> Any:
        """This moment in the device's queue."""
        return self._clock.mark()

    def since(self, name: str, start: Any) -> None:
        """Add the time from a mark until now to `seconds/NAME`."""
        self._spans.append((name, start, self._clock.mark()))
        if self._clock.ready:
            self._read_clock()

    def _read_clock(self) -> None:
        """Turn marks into seconds."""
        for name, start, end in self._spans:
            self.add(f"{SECONDS}{name}", self._clock.between(start, end))
        self._spans = []

    def row(self) -> dict[str, float]:
        """Everything since the last row, which is emptied. Means over nothing are left out."""
        self._read_clock()
        row = {}
        for name, total in self._sums.items():
            if name not in self._weights:
                row[name] = float(total)
            elif self._weights[name]:
                row[name] = float(total) / self._weights[name]
        self.clear()
        return row

    def clear(self) -> None:
        """Begin anew."""
        self._sums, self._weights, self._spans = {}, {}, []

    def copy(self) -> MetricAccumulator:
        """What has been added so far, whatever is added later."""
        copied = MetricAccumulator(self._clock)
        copied.replace(self)
        return copied

    def replace(self, other: MetricAccumulator) -> None:
        """Hold what the other one holds."""
        self._sums, self._weights = dict(other._sums), dict(other._weights)
        self._spans = list(other._spans)

    def total(self, name: str) -> float:
        """The sum of a metric so far."""
        self._read_clock()
        return float(self._sums.get(name, 0.0))

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The sums so far, and the weights of those that are means."""
        self._read_clock()
        return {
            "sums": {name: float(total) for name, total in self._sums.items()},
            "weights": dict(self._weights),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Put back what `state_dict` gave."""
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])
        self._spans = []


def over_processes(states: Sequence[Mapping[str, Mapping[str, float]]]) -> MetricAccumulator:
    """What all processes have measured together, from the `state_dict` of each."""
    whole = MetricAccumulator()
    for state in states:
        for name, total in state["sums"].items():
            if name in state["weights"]:
                whole.add_mean(name, total, state["weights"][name])
            elif name.startswith(SECONDS):
                whole.add(name, max(0.0, total - whole.total(name)))
            else:
                whole.add(name, total)
    return whole
