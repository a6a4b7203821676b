"""Signals that ask a program to end: Ctrl-C, a scheduler's SIGTERM or warning, a terminal that closes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Kubernetes and Slurm send SIGTERM before they kill; `sbatch --signal=USR1@120` warns by SIGUSR1."""
SECONDS_TO_END = 5.0
"""Seconds that the interpreter has for its end after a signal; a scheduler kills 30 s after its SIGTERM."""
Handler = Callable[[int, FrameType | None], None]


class Stopped(KeyboardInterrupt):
    """A signal has asked the program to end; whatever ends well after Ctrl-C ends well after this."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.signal


def stop(number: int, _: FrameType | None) -> None:
    """The handler that stops at once."""
    raise Stopped(number)


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Call `handler` for the signals of `ENDING` within the block; one that is ignored (nohup) stays so.

    Outside the main thread, where Python does not allow it, nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def name_of(error: KeyboardInterrupt) -> str:
    """What has stopped the program, in words."""
    number = error.signal if isinstance(error, Stopped) else signal.SIGINT
    return "Ctrl-C" if number is signal.SIGINT else number.name


def exit_code_of(error: KeyboardInterrupt) -> int:
    """The exit code of a program that this has stopped."""
    return error.exit_code if isinstance(error, Stopped) else 128 + signal.SIGINT


def broke_off(error: BaseException) -> bool:
    """Whether an error goes back to a signal that has broken something off, in the midst of what it did."""
    causes: BaseException | None = error
    while causes is not None and not isinstance(causes, KeyboardInterrupt):
        causes = causes.__cause__ or causes.__context__
    return causes is not None


def end_soon(code: int) -> None:
    """End the process with an exit code, and those that it has started, unless it ends by itself within
    `SECONDS_TO_END`, once all is said. A further signal changes nothing any more.

    At its end Python waits for every thread and process of every library. A thread that a signal has met at
    its start is known to no pool, so nobody tells it to end; others go on with their queue: transformers
    reads all weights that it was asked for.
    """
    import psutil

    if threading.current_thread() is threading.main_thread():
        for number in ENDING:  # one more Ctrl-C would break off what ends the process
            signal.signal(number, signal.SIG_IGN)

    def end() -> None:
        time.sleep(SECONDS_TO_END)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        os._exit(code)

    threading.Thread(target=end, name="end soon", daemon=True).start()
