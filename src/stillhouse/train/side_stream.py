"""Work beside the student's pass: on a second stream of a GPU, at once on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


class HoldsTensors(Protocol):
    """What another stream makes for this one."""

    def tensors(self) -> Iterable[Tensor]:
        """All tensors that it has made."""
        ...


Made = TypeVar("Made", bound=HoldsTensors)


@dataclass(frozen=True, slots=True)
class Pending(Generic[Made]):
    """Something that is being made."""

    value: Made
    finished: torch.cuda.Event | None
    """Reached by the other stream when it has made it; None on a CPU, where it is there."""

    def taken(self) -> Made:
        """It, for work that is queued from now on; the host does not wait.

        The memory of its tensors belongs to the other stream, which must not use it anew before this one has
        read them.
        """
        if self.finished is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self.finished)
            for tensor in self.value.tensors():
                if tensor.is_cuda:
                    tensor.record_stream(current)
        return self.value


class SideStream:
    """Runs work in the order in which it is given, beside what is queued later on the current stream.

    The work begins when all that is queued by then has run, so it may read any tensor that is there, if that
    lives until the result is taken.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def run(self, work: Callable[[], Made], device: torch.device) -> Pending[Made]:
        """Start `work`; on a CPU, do it."""
        if device.type != "cuda":
            return Pending(work(), None)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            return Pending(work(), stream.record_event())
