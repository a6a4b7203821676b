"""Watches the other processes of a command, so that none waits for ever for one that has ended.

A collective operation learns of a dead peer by its connection at best, and by its timeout of many minutes at
worst. Here each process tells the others that it lives, and how it ends, through the store at which the
launcher lets them meet (MASTER_ADDR, MASTER_PORT); a thread looks for those that went silent.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from stillhouse import console
from stillhouse.core.distributed import rank_and_size
from stillhouse.errors import ConfigError, EnvironmentFault, Fault

INTERVAL = 1.0
"""Seconds between two looks."""
GRACE = 5.0
"""Seconds in which a process may end by itself once another has."""
LOST_AFTER = 120.0
"""Seconds of silence after which a process counts as dead, where its id cannot be asked for. A process that
holds Python's lock, as some libraries do while they load, is silent too."""
LOST_AFTER_VARIABLE = "STILLHOUSE_LOST_AFTER"
"""The environment variable that says another number of seconds."""
SHORTEST = 4 * INTERVAL
"""The least that it may say: a process tells that it lives once an interval."""
START_SECONDS = 300.0
"""Seconds in which the other processes have to start."""
DONE = "done"
STOPPED = "stopped by"
"""How the end of a process begins that a signal has ended."""

_current: list[OtherProcesses] = []


def current() -> OtherProcesses | None:
    """Those of this command; None where there are none, or nothing has joined them."""
    return _current[-1] if _current else None


def fault_before_signal() -> EnvironmentFault | None:
    """What ends this process where a signal came because another had ended; None where it is meant."""
    gone = None if (others := current()) is None else others.ended_before()
    return None if gone is None else EnvironmentFault(f"{gone}. {GO_ON}")


def leave(how: str = DONE) -> None:
    """Tell the others of this command, if there are any, that this process ends, and how."""
    if (others := current()) is not None:
        others.leave(" ".join(how.split())[:300])


class OtherProcesses:
    """What is known of the other processes of a command.

    Example:
        >>> others = OtherProcesses.join()
        >>> ...
        >>> others.leave()
    """

    def __init__(self, store: Any, rank: int, size: int, lost_after: float = LOST_AFTER) -> None:
        """Tell the others that this one is there, and begin to watch them.

        Args:
            store: where they meet; this object's own connection to it.
            rank: of this process.
            size: how many there are.
            lost_after: seconds of silence after which one counts as dead.
        """
        self.lost: str | None = None
        """Which process has ended and how, once one has."""
        self.on_lost: Callable[[str], None] = lambda message: None
        """Called before this process ends itself because another has ended."""
        self._store, self._rank, self._size, self._lost_after = store, rank, size, lost_after
        self._others = [one for one in range(size) if one != rank]
        self._done: set[int] = set()
        self._places: dict[int, tuple[str, int]] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._began = time.monotonic()
        self._left = threading.Event()
        store.set(f"place/{rank}", f"{socket.gethostname()} {os.getpid()}")
        store.add("joined", 1)
        self._thread = threading.Thread(target=self._watch, name="other processes", daemon=True)
        _current.append(self)
        self._thread.start()

    @classmethod
    def join(cls) -> OtherProcesses | None:
        """Those that the launcher has started with this one; None if there are none, or none to be met.

        Raises:
            EnvironmentFault: the store cannot be reached.
            ConfigError: `LOST_AFTER_VARIABLE` holds no number of seconds.
        """
        rank, size = rank_and_size()
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if size == 1 or not address or not port:
            return None
        lost_after = _lost_after()
        from datetime import timedelta

        from torch.distributed import PrefixStore, TCPStore

        held_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host = rank == 0 and not held_by_launcher
        limit = timedelta(seconds=START_SECONDS)
        try:
            store = TCPStore(
                address,
                int(port),
                size,
                host,
                limit,
                wait_for_workers=False,
                multi_tenant=not held_by_launcher,
            )
        except (RuntimeError, ValueError) as error:
            raise EnvironmentFault(
                f"process {rank} of {size} cannot reach process 0 at {address}:{port} (MASTER_ADDR, "
                f"MASTER_PORT): {str(error).splitlines()[0][:200]}. Start all of them, with the same address."
            ) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(PrefixStore(f"stillhouse/{attempt}", store), rank, size, lost_after)

    def tells(self) -> bool:
        """Whether this process is the one to tell how the command has failed: the first that asks."""
        try:
            return bool(self._store.compare_set("told", "", str(self._rank)).decode() == str(self._rank))
        except RuntimeError:  # process 0 has gone, and with it the store
            return True

    def why(self) -> str | None:
        """Which process has ended and how, if that is so or becomes known within a moment."""
        deadline = time.monotonic() + GRACE
        while self.lost is None and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(INTERVAL / 10)
        return self.lost

    def ended_before(self) -> str | None:
        """Which process had died or failed when a signal came to this one: launchers send the others SIGTERM
        then. None where the signal is meant for all.
        """
        try:
            failed = self._failed()
            if len(self._places) < len(self._others):  # it has not looked round since the last one came
                self._arrivals(time.monotonic())
            for one in self._places:
                told = one in self._done or failed is not None or self._store.check([f"end/{one}"])
                if not told and not self._may_live(one):
                    return f"{self._name(one)} has died. {ITS_OUTPUT}"
        except RuntimeError:
            return f"process 0 of {self._size} has ended. {ITS_OUTPUT}"
        return None if failed is None or f": {STOPPED}" in failed else failed

    def leave(self, how: str = DONE) -> None:
        """Tell the others that this process ends, and how; the first one waits until those that live know."""
        if self._left.is_set():
            return
        self._left.set()
        _current.remove(self)
        try:
            self._store.set(f"end/{self._rank}", how)
            self._store.add("ended", 1)
            deadline = time.monotonic() + 2 * GRACE
            while self._rank == 0 and self._store.add("ended", 0) < self._size and self._any_lives():
                if time.monotonic() > deadline:
                    return
                time.sleep(INTERVAL / 10)
        except RuntimeError:
            return

    def _any_lives(self) -> bool:
        """Whether one of the others that has not said that it ends may still ask for what this one knows."""
        self._arrivals(time.monotonic())
        unheard = [one for one in self._others if not self._store.check([f"end/{one}"])]
        return any(one not in self._places or self._may_live(one) for one in unheard)

    def _may_live(self, one: int) -> bool:
        host, process = self._places[one]
        return host != socket.gethostname() or _lives(process)

    def _watch(self) -> None:
        ended = 0
        while not self._left.wait(INTERVAL):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                if (now := self._store.add("ended", 0)) != ended:
                    ended, self.lost = now, self._failed()
                self.lost = self.lost or self._silent()
            except RuntimeError:
                if 0 in self._done:
                    return
                self.lost = (
                    f"process 0 of {self._size} has ended, or its machine cannot be reached. {ITS_OUTPUT}"
                )
            if self.lost is not None:
                self._end_with(self.lost)
                return

    def _failed(self) -> str | None:
        """The first of the others that has ended in another way than well."""
        for one in self._others:
            if one in self._done or not self._store.check([f"end/{one}"]):
                continue
            how = self._store.get(f"end/{one}").decode()
            if how != DONE:
                return f"process {one} of {self._size} has ended: {how}"
            self._done.add(one)
        return None

    def _silent(self) -> str | None:
        """The first of the others that is dead, or has not been heard of for too long."""
        now = time.monotonic()
        if len(self._places) < len(self._others):
            return self._arrivals(now)
        for one in self._places:
            if one in self._done:
                continue
            if not self._may_live(one):
                failed = self._failed()  # it may have said so since
                if failed or one not in self._done:
                    return failed or f"{self._name(one)} has died. {ITS_OUTPUT}"
                continue
            beat, heard = self._beats.get(one, (-1, now))
            if now - heard < self._lost_after / 4 and beat >= 0:
                continue
            if (found := self._store.add(f"beat/{one}", 0)) != beat:
                self._beats[one] = found, now
            elif now - heard > self._lost_after:
                return f"{self._name(one)} has said nothing for {self._lost_after:.0f} s. {SILENT}"
        return None

    def _name(self, one: int) -> str:
        host, process = self._places[one]
        return f"process {one} of {self._size} (id {process} on {host})"

    def _arrivals(self, now: float) -> str | None:
        if self._store.add("joined", 0) >= self._size:
            for one in self._others:
                host, process = self._store.get(f"place/{one}").decode().split()
                self._places[one] = host, int(process)
        elif now - self._began > START_SECONDS:
            absent = [str(one) for one in self._others if not self._store.check([f"place/{one}"])]
            return f"process {', '.join(absent)} of {self._size} has not started in {START_SECONDS:.0f} s"
        return None

    def _end_with(self, message: str) -> None:
        """End this process, unless it does so by itself: it may wait for the other one in a library."""
        if self._left.wait(GRACE):
            return
        self.on_lost(message)
        if self.tells():
            console.show_error(EnvironmentFault(f"{message}. {GO_ON}"))
        os._exit(EnvironmentFault.exit_code)


def _lost_after() -> float:
    given = os.environ.get(LOST_AFTER_VARIABLE) or str(LOST_AFTER)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not SHORTEST <= seconds < float("inf"):
        raise ConfigError(
            Fault(
                LOST_AFTER_VARIABLE,
                "is the silence after which a process counts as dead",
                got=given,
                allowed=f"seconds, at least {SHORTEST:g}",
            )
        )
    return seconds


ITS_OUTPUT = "Its own output says why; if it has none, the kernel may have killed it for memory"
SILENT = (
    "It is stopped, held by a library, or out of reach; where it needs longer, set "
    f"{LOST_AFTER_VARIABLE} (seconds) in the environment of all processes"
)
GO_ON = "All processes of the command end; a run continues with --resume from its last checkpoint."


def _lives(process: int) -> bool:
    """Whether a process of this machine runs; one that has ended and that nobody has waited for does not."""
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return not os.path.isdir("/proc/self")
    except OSError:
        return True
