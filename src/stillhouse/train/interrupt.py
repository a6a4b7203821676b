"""A signal in the middle of training: the step is finished, a checkpoint is written, and then it ends."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

from stillhouse import console, signals
from stillhouse.core.distributed import World

GRACE_SECONDS = 10.0
"""How long a scheduler's signal waits for the end of a step whose responses are still being generated. Slurm
and Kubernetes kill 30 seconds after their SIGTERM, and the checkpoint has to be written in between."""


class Interruptible(Protocol):
    """What training tells about the step that is under way."""

    generating: bool
    """Whether it still generates responses, so that nothing is lost if it is given up."""

    @property
    def world(self) -> World:
        """The other processes."""
        ...

    def give_up(self) -> None:
        """Go back to before the step whose responses are being drawn."""
        ...


class Interrupt:
    """Decides what a signal does: outside training it stops at once, within it after the step.

    Of several processes all stop after the same step, whichever of them got the signal. A second Ctrl-C stops
    at once. A step that goes on generating for `GRACE_SECONDS` after another signal is given up: it has
    changed no weights, so the checkpoint is that of the step before.
    """

    def __init__(self) -> None:
        self.by: signals.Stopped | None = None
        """The signal that asks for an end."""
        self._step: Interruptible | None = None
        self._random_states: dict[str, Any] = {}
        self._handled = signals.handled(self._request)
        self._alarm: Any = None
        self._given_up = False

    def __enter__(self) -> Interrupt:
        self._handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._disarm()
        self._handled.__exit__(None, None, None)

    @property
    def requested(self) -> bool:
        """Whether training was asked to end early."""
        return self.by is not None

    @contextlib.contextmanager
    def waits_for(self, step: Interruptible) -> Iterator[None]:
        """Within the block signals wait for the end of a step."""
        self._step = step
        try:
            yield
        finally:
            self._step = None
            self._disarm()

    def _request(self, number: int, _: FrameType | None) -> None:
        stopped = signals.Stopped(number)
        if self._step is None or (self.requested and number == signal.SIGINT):
            raise stopped
        if self.requested:
            return
        self.by = stopped
        if number == signal.SIGINT:
            console.note("Stopping after this step; press Ctrl-C again to stop at once.")
            return
        console.note(f"{stopped.signal.name}: saving a checkpoint after this step, then stopping.")
        if self._step.world.size == 1:
            self._alarm = signal.signal(signal.SIGALRM, self._give_up)
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS, 1.0)

    def _give_up(self, *_: object) -> None:
        """Stop now if that loses nothing but what is being generated."""
        if self._step is not None and self._step.generating and self.by is not None:
            self._given_up = True
            raise self.by

    def _disarm(self) -> None:
        if self._alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm)
            self._alarm = None

    def after_step(self) -> bool:
        """Whether any process was asked to save and stop; all of them have to ask, after each step."""
        assert self._step is not None
        if self._step.world.size > 1:
            here = torch.tensor(
                [float(self.by is not None and self.by.signal == one) for one in signals.ENDING]
            )
            asked = self._step.world.add(here).nonzero().flatten().tolist()
            self.by = signals.Stopped(signals.ENDING[asked[0]]) if asked else None
        self._random_states = _random_states()
        return self.requested

    def give_up_step(self) -> bool:
        """Go back to the end of the step before one that was given up; whether there is one to go back to."""
        assert self._step is not None
        if not self._given_up or not self._random_states:
            return False
        self._step.give_up()
        _set_random_states(self._random_states)
        return True


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    cpu = torch.get_rng_state()
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": cpu, "cuda": cuda}


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
