"""Starts worker and checker, watches over them, and says whether the program passed."""

from __future__ import annotations

import contextlib
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

from stillhouse.errors import EnvironmentFault

ROOT = Path(__file__).resolve().parents[2]
VERDICT = 4096
"""Bytes that a verdict may have."""

Reason = Literal["passed", "failed", "time", "memory", "size", "died"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use. Example: `Limits(seconds=5.0)`"""

    seconds: float = 10.0
    """Wall-clock time of program and tests together."""
    cpu_seconds: int = 10
    """Processor time of each of the two processes."""
    memory: int = 512 << 20
    """Bytes of address space."""
    file_size: int = 1 << 20
    """Bytes of one file, what it prints included."""
    folder_size: int = 8 << 20
    """Bytes of all its files."""


@dataclass(frozen=True, slots=True)
class Checks:
    """What decides. Example: `Checks("assert double(2) == 4")`"""

    text: str
    """Python that raises unless the program is right. It sees the program's names, which do not see it."""
    entry_point: str | None = None
    """If given, the text defines `check(candidate)`, which is called with this function (HumanEval)."""
    provides: tuple[str, ...] = ()
    """Names that the tests take from the program even where they are builtin; others are found by themselves.
    A program that defines `len` changes what the tests call `len` only if `len` is named here."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a program. Example: `Verdict(False, "failed", "tests: AssertionError")`"""

    passed: bool
    reason: Reason
    detail: str
    """Stage and exception for the reader; text that a program may have chosen, so never to be trusted."""


def require() -> None:
    """Make sure that programs can be confined here.

    Raises:
        EnvironmentFault: they cannot, with what is missing. There is no unconfined mode.
    """
    what = None
    if not sys.platform.startswith("linux"):
        what = "this system is not Linux. Use Linux, or a virtual machine or container that runs it"
    else:
        from stillhouse.sandbox.confine import landlock_version, seccomp_library

        if not landlock_version():
            what = "the kernel has no Landlock (Linux 5.13 and newer have it)"
        elif seccomp_library() is None:
            what = "libseccomp is not installed (Debian and Ubuntu: apt install libseccomp2)"
    if what:
        raise EnvironmentFault(f"programs written by a model run only in a sandbox, and {what}.")


def check_program(program: str, tests: Checks, limits: Limits | None = None) -> Verdict:
    """Run a program that nobody has read, and tests against it.

    Args:
        program: Python source; executed as a module that is not `__main__`.
        tests: what it has to pass.
        limits: what it may use.

    Returns:
        The verdict. Everything that goes wrong in either process is a failure of the program.

    Raises:
        EnvironmentFault: this machine cannot confine a process.
    """
    require()
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as place:
        folders = [Path(place) / name for name in ("worker", "checker")]
        for folder in folders:
            folder.mkdir()
        with _running(folders, limits) as (worker, checker, verdict):
            task = {
                "text": program,
                "tests": tests.text,
                "entry_point": tests.entry_point,
                "provides": tests.provides,
            }
            assert checker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                checker.stdin.write(json.dumps(task).encode())
                checker.stdin.close()
            ended = _watch(checker, folders[0], limits)
            _kill(checker)
            _kill(worker)
            said = _verdict(verdict)
        return _judge(ended, said, worker.returncode)


def _judge(ended: Reason | None, said: dict[str, Any] | None, status: int) -> Verdict:
    if ended is not None:
        return Verdict(False, ended, {"time": "took too long", "size": "wrote too much"}[ended])
    if said is None:
        return Verdict(False, "died", "the tests did not come to an end")
    if said.get("passed") is True:
        return Verdict(True, "passed", "")
    detail = f"{said.get('stage')}: {said.get('reason')}"
    if status == -signal.SIGXCPU:
        return Verdict(False, "time", detail)
    return Verdict(False, "memory" if "MemoryError" in detail else "failed", detail)


@contextlib.contextmanager
def _running(
    folders: list[Path], limits: Limits
) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes], int]]:
    to_worker, from_worker, verdict = os.pipe(), os.pipe(), os.pipe()
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start("worker", folders[0], limits, to_worker[0], (from_worker[1],)))
        pipes = (to_worker[1], from_worker[0], verdict[1])
        started.append(_start("checker", folders[1], limits, subprocess.PIPE, pipes))
        for end in (to_worker[0], from_worker[1], *pipes):
            os.close(end)
        yield started[0], started[1], verdict[0]
    finally:
        for process in started:
            _kill(process)
        os.close(verdict[0])


def _start(
    role: str, folder: Path, limits: Limits, stdin: int, pipes: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    inside = {
        "parent": os.getpid(),
        "memory": limits.memory,
        "cpu_seconds": limits.cpu_seconds,
        "file_size": limits.file_size,
    }
    begin = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from stillhouse.sandbox import {role}\n"
        "del sys.path[0]\n"
        f"{role}.main({str(folder)!r}, {inside!r}, {pipes!r})"
    )
    # What is printed goes to a file, whose size is limited; nobody reads it.
    with open(folder / "printed", "wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", begin],
            cwd=folder,
            env={},
            stdin=stdin,
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=pipes,
            start_new_session=True,
        )


def _watch(checker: subprocess.Popen[bytes], folder: Path, limits: Limits) -> Reason | None:
    """Wait for the checker's end; why it was not waited for any longer, if it was not."""
    until = time.monotonic() + limits.seconds
    pause = 0.002
    while checker.poll() is None:
        if time.monotonic() > until:
            return "time"
        if _size(folder, limits.folder_size) > limits.folder_size:
            return "size"
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    return None


def _size(folder: Path, most: int) -> int:
    """Bytes of the files in a folder, counting at least 4096 each; stops where there is too much already."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += max(4096, entry.stat(follow_symlinks=False).st_size)
            if total > most:
                break
    return total


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # else its number may be somebody else's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _verdict(pipe: int) -> dict[str, Any] | None:
    """What the checker wrote before it ended; None if that is no verdict."""
    try:
        said = json.loads(os.read(pipe, VERDICT))
    except ValueError:
        return None
    return said if isinstance(said, dict) else None
