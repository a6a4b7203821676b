"""Starts worker and checker, enforces their limits, and says whether the program passed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

IMPORT_ROOT = Path(__file__).resolve().parents[2]
MAX_OUTCOME_BYTES = 4096

Status = Literal["passed", "failed", "timeout", "memory", "disk", "threads", "crashed"]
Exceeded = Literal["timeout", "disk", "threads"]


class SandboxUnavailable(RuntimeError):
    """Processes cannot be confined on this machine; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use. Example: `Limits(timeout=5.0)`"""

    timeout: float = 10.0
    """Wall-clock seconds of program and tests together."""
    cpu_seconds: int = 10
    """CPU time of each of the two processes."""
    memory: int = 512 << 20
    """Bytes of address space of each process."""
    file_size: int = 1 << 20
    """Bytes of one file; what the program prints counts as one."""
    folder_size: int = 8 << 20
    """Bytes of all its files, but for deleted ones that it keeps open: `file_size` each, at most 16."""
    threads: int = 64
    """Threads of each of the two processes."""


@dataclass(frozen=True, slots=True)
class ProgramTests:
    """The tests that a program has to pass. Example: `ProgramTests("assert double(2) == 4")`"""

    source: str
    """Python that raises unless the program is correct. It sees the program's names, never the reverse."""
    entry_point: str | None = None
    """If given, the source defines `check(candidate)`, which is called with this function (HumanEval)."""
    overrides: tuple[str, ...] = ()
    """Builtins that the tests take from the program: its own `len` is what the tests call `len` only if named
    here. Names that are not builtins need no mention."""
    helpers: str = ""
    """Python that runs before the tests, beside them: what it defines is never taken from the program, which
    may have changed it (the helper functions of a HumanEval prompt)."""


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """How a program ended. Example: `ExecutionResult(False, "failed", "tests: AssertionError")`"""

    passed: bool
    status: Status
    detail: str
    """Stage and exception. The program may have chosen this text: display it, never trust it."""


def ensure_available() -> None:
    """Check that processes can be confined on this machine.

    Raises:
        SandboxUnavailable: they cannot, with what is missing. There is no unconfined mode.
    """
    missing = None
    if not sys.platform.startswith("linux"):
        missing = "this system is not Linux. Use Linux, or a virtual machine or container that runs it"
    else:
        from stillhouse.sandbox import confine  # Linux only

        if not confine.landlock_version():
            missing = "the kernel has no Landlock (Linux 5.13 and newer have it)"
        elif confine.libseccomp() is None:
            missing = "libseccomp is not installed (Debian and Ubuntu: apt install libseccomp2)"
    if missing:
        raise SandboxUnavailable(f"programs written by a model run only in a sandbox, and {missing}.")


@functools.cache
def hides_files() -> bool:
    """Whether this machine gives a confined process a root of its own (`namespace.py`).

    If not, a program can still open nothing outside, but learn whether a file exists and its size.
    """
    code = (
        f"import sys; sys.path.insert(0, {str(IMPORT_ROOT)!r})\n"
        "from stillhouse.sandbox import confine, namespace\n"
        "namespace.enter(sys.argv[1], confine.readable_paths())"
    )
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as place:
        folder = Path(place) / "worker"
        folder.mkdir()
        command = [sys.executable, "-I", "-S", "-c", code, str(folder)]
        return subprocess.run(command, env={}, capture_output=True, check=False).returncode == 0


def check_program(program: str, tests: ProgramTests, limits: Limits | None = None) -> ExecutionResult:
    """Run tests against an untrusted program.

    Args:
        program: Python source; executed as a module that is not `__main__`.
        tests: what it has to pass.
        limits: what it may use.

    Returns:
        The result. Whatever goes wrong in either process is a failure of the program.

    Raises:
        SandboxUnavailable: this machine cannot confine a process.
    """
    ensure_available()
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as place:
        folders = [Path(place) / name for name in ("worker", "checker")]
        for folder in folders:
            folder.mkdir()
        with _processes(folders, limits) as (worker, checker, outcome_pipe):
            job = {
                "source": program,
                "tests": tests.source,
                "entry_point": tests.entry_point,
                "overrides": tests.overrides,
                "helpers": tests.helpers,
            }
            assert checker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                checker.stdin.write(json.dumps(job).encode())
                checker.stdin.close()
            exceeded = _wait(checker, worker, folders[0], limits)
            _kill(checker)
            _kill(worker)
            outcome = _read_outcome(outcome_pipe)
        return _result(exceeded, outcome, worker.returncode)


def _result(exceeded: Exceeded | None, outcome: dict[str, Any] | None, returncode: int) -> ExecutionResult:
    if exceeded is not None:
        detail = {
            "timeout": "took too long",
            "disk": "wrote too much",
            "threads": "started too many threads",
        }[exceeded]
        return ExecutionResult(False, exceeded, detail)
    if outcome is None:
        return ExecutionResult(False, "crashed", "the tests did not finish")
    if outcome.get("passed") is True:
        return ExecutionResult(True, "passed", "")
    detail = f"{outcome.get('stage')}: {outcome.get('error')}"
    if returncode == -signal.SIGXCPU:
        return ExecutionResult(False, "timeout", detail)
    return ExecutionResult(False, "memory" if "MemoryError" in detail else "failed", detail)


@contextlib.contextmanager
def _processes(
    folders: list[Path], limits: Limits
) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes], int]]:
    """Worker, checker, and the pipe on which the checker writes the outcome."""
    to_worker, from_worker, outcome = os.pipe(), os.pipe(), os.pipe()
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start("worker", folders[0], limits, to_worker[0], (from_worker[1],)))
        pipes = (to_worker[1], from_worker[0], outcome[1])
        started.append(_start("checker", folders[1], limits, subprocess.PIPE, pipes))
        for end in (to_worker[0], from_worker[1], *pipes):
            os.close(end)
        yield started[0], started[1], outcome[0]
    finally:
        for process in started:
            _kill(process)
        os.close(outcome[0])


def _start(
    role: str, folder: Path, limits: Limits, stdin: int, pipes: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    options = {
        "parent": os.getpid(),
        "memory": limits.memory,
        "cpu_seconds": limits.cpu_seconds,
        "file_size": limits.file_size,
        "threads": limits.threads,
        "own_root": hides_files(),
    }
    code = (
        f"import sys; sys.path.insert(0, {str(IMPORT_ROOT)!r})\n"
        f"from stillhouse.sandbox import {role}\n"
        "del sys.path[0]\n"
        f"{role}.main({str(folder)!r}, {options!r}, {pipes!r})"
    )
    # Output goes to a file, whose size is limited; nobody reads it.
    with open(folder / "printed", "wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            cwd=folder,
            env={},
            stdin=stdin,
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=pipes,
            start_new_session=True,
        )


def _wait(
    checker: subprocess.Popen[bytes], worker: subprocess.Popen[bytes], folder: Path, limits: Limits
) -> Exceeded | None:
    """Wait for the checker to end; the limit that was exceeded if it did not."""
    deadline = time.monotonic() + limits.timeout
    pause = 0.002
    while checker.poll() is None:
        if time.monotonic() > deadline:
            return "timeout"
        if _size(folder, limits.folder_size) > limits.folder_size:
            return "disk"
        if max(_threads(worker.pid), _threads(checker.pid)) > limits.threads:
            return "threads"
        time.sleep(pause)
        pause = min(0.01, pause * 1.5)  # some ten threads start in a millisecond
    return None


def _threads(pid: int) -> int:
    """Threads of a process; 0 where it has ended."""
    try:
        return os.stat(f"/proc/{pid}/task").st_nlink - 2  # one folder for each
    except OSError:
        return 0


def _size(folder: Path, limit: int) -> int:
    """Bytes of the files in a folder, at least 4096 each; stops counting beyond the limit."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += max(4096, entry.stat(follow_symlinks=False).st_size)
            if total > limit:
                break
    return total


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # otherwise the pid may have been reused
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _read_outcome(pipe: int) -> dict[str, Any] | None:
    """What the checker wrote before it ended; None if that is not an outcome."""
    try:
        outcome = json.loads(os.read(pipe, MAX_OUTCOME_BYTES))
    except ValueError:
        return None
    return outcome if isinstance(outcome, dict) else None
