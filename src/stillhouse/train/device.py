"""What is measured of the device that trains: when it passed a mark, and its memory."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class PhaseClock(Protocol):
    """Marks moments, and says how long it is from one to another."""

    ready: bool
    """Whether a moment can be read at once. The other kind is read when a row of the log is written."""

    def mark(self) -> Any:
        """This moment, in the order of the work that is queued."""
        ...

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to the other; waits until the later one is reached."""
        ...


class HostClock:
    """The clock of the program, which on a CPU is that of the work."""

    ready = True

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        """The difference."""
        return end - start


class StreamClock:
    """The clock of a GPU: an event for each mark, which its current stream reaches in its own time.

    The program only queues work and would measure how long that takes. Streams that work side by side both
    count, so the phases together may be longer than the step.
    """

    ready = False

    def mark(self) -> torch.cuda.Event:
        """When the current stream gets here; waits for nothing."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """As both events say."""
        end.synchronize()
        return start.elapsed_time(end) / 1000


def phase_clock(device: torch.device) -> PhaseClock:
    """The clock of the work on this device."""
    return StreamClock() if device.type == "cuda" else HostClock()


def device_memory(device: torch.device) -> dict[str, float]:
    """Bytes of a GPU that tensors take now and took at most, and that torch holds for them; none on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "memory/allocated": float(torch.cuda.memory_allocated(device)),
        "memory/reserved": float(torch.cuda.memory_reserved(device)),
        "memory/peak": float(torch.cuda.max_memory_allocated(device)),
    }
