"""One run of a sweep in a process of its own: what it prints goes to a log, and its end is told in words.

The processes are forked from a server that has imported everything and computed nothing, so that a run starts
at once and a crash costs that run alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from stillhouse import console, locks, signals
from stillhouse.errors import StillhouseError

PRELOADED = ["stillhouse.runs.sweep.process_imports"]
DONE, STOPPED, FAILED = 0, 130, 3
"""Exit codes of a run's process."""
PATIENCE = 120.0
"""Seconds that a run waits for a process of a killed sweep to leave its folder."""


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """What one of several worker processes has for itself: its number, its threads, its device."""

    slot: int
    """Its number, from 0."""
    threads: int | None
    """Of torch; None: its default."""
    device: str | None
    """What CUDA_VISIBLE_DEVICES is for it; None: as it is."""


def worker_slots(workers: int) -> list[WorkerSlot]:
    """Where so many processes work: cores are divided evenly, GPUs are taken in turn."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    given = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    threads = None if workers == 1 else max(1, torch.get_num_threads() // workers)
    several = workers > 1 and len(given) > 1
    return [WorkerSlot(n, threads, given[n % len(given)] if several else None) for n in range(workers)]


class RunProcess:
    """A process that runs one function and logs what it prints."""

    def __init__(self, task: Callable[[], None], log: Path, place: WorkerSlot) -> None:
        """Start it.

        Args:
            task: picklable; raises where it does not come to its end.
            log: a file that what it prints is added to.
            place: where it works.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.place = place
        self.log = log
        self._fault, fault = context.Pipe(duplex=False)
        surroundings = _Surroundings(os.getcwd(), dict(os.environ), str(log.resolve()), place)
        self._process: BaseProcess = context.Process(target=_enter, args=(task, surroundings, fault))
        self._process.start()
        fault.close()

    @property
    def sentinel(self) -> int:
        """Ready when the process has ended."""
        return self._process.sentinel

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self._process.exitcode is not None

    @property
    def succeeded(self) -> bool:
        """Whether its task has come to its end."""
        return self._process.exitcode == DONE

    @property
    def crashed(self) -> bool:
        """Whether it has ended neither well nor by a signal that it handled."""
        return self._process.exitcode not in (DONE, STOPPED)

    def send(self, number: signal.Signals) -> None:
        """Pass a signal on."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def failure(self) -> str:
        """Why the task has not come to its end: what it raised, else by its exit code, with the last line of
        its log."""
        code = self._process.exitcode
        with contextlib.suppress(EOFError, OSError):
            if self._fault.poll():
                return str(self._fault.recv())
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        )
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            memory = "; the kernel may have killed it for memory" if name == "SIGKILL" else ""
            return f"its process was killed by {name}{memory}"
        return last or f"its process ended with exit code {code}"


def wait_for(workers: list[RunProcess], seconds: float) -> None:
    """Until one of them has ended, but no longer than that."""
    wait([one.sentinel for one in workers], timeout=seconds)


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What a process forked from a server would not have of the sweep's own."""

    folder: str
    environment: dict[str, str]
    log: str
    place: WorkerSlot


def _enter(task: Callable[[], None], around: _Surroundings, fault: Connection) -> None:
    """The first function of the process; its exit code says how the task ended."""
    os.setpgrp()  # Ctrl-C in a terminal reaches the sweep alone, which passes it on
    os.chdir(around.folder)
    os.environ.clear()
    os.environ.update(around.environment)
    if around.place.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = around.place.device
    _print_into(around.log)
    _end_with_parent()
    import torch

    if around.place.threads is not None:
        torch.set_num_threads(around.place.threads)
    console.print_log_records()
    code = FAILED
    try:
        with signals.handled(signals.stop):
            task()
        code = DONE
    except KeyboardInterrupt:
        code = STOPPED
    except StillhouseError as error:
        fault.send(str(error))
        console.show_error(error)
    except BaseException as error:  # noqa: BLE001  (the log and the sweep are the only places to tell it)
        fault.send(f"{type(error).__name__}: {error}")
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_into(log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


def _end_with_parent() -> None:
    """Save and stop, as after SIGTERM, when the sweep's own process is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def wait_until_free(folder: Path) -> None:
    """Wait for a process of a killed sweep that still saves a run, as long as that may take."""
    ends = time.monotonic() + PATIENCE
    while locks.is_held(folder / locks.FILE) and time.monotonic() < ends:
        time.sleep(0.1)
