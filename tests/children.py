"""Processes of their own for tests that kill, limit or interrupt, ready at once.

They are forked from a server that has imported everything and computed nothing. A fork of the test process
itself would inherit whatever locks its threads hold at that moment (of an allocator, of torch's thread pool)
and now and then hang or fail.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.devices import WITHOUT_GPU

SECONDS = 300
"""As long as any child may take; far more than it needs."""

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.preloaded"])


def start(target: Callable[..., None], *arguments: Any, env: Mapping[str, str] | None = None) -> BaseProcess:
    """Call a function of a module in a new process that has this one's folder and environment, and `env`."""
    environment = {**os.environ, **(env or {})}
    child = _SERVER.Process(target=_enter, args=(os.getcwd(), environment, target, arguments))
    with contextlib.chdir(ROOT):  # where the server finds what it imports, if this starts it
        child.start()
    return child


def ranks(count: int, target: Callable[..., None], *arguments: Any, seconds: float = SECONDS) -> list[int]:
    """Call a function in `count` processes that are the ranks of one group (gloo, on the CPU).

    Returns:
        The exit code of each; a process whose function raised ends with 1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env = {**address, "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true", **WITHOUT_GPU}
    children = [
        start(target, *arguments, env={**env, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else env)
        for rank in map(str, range(count))
    ]
    return [end(child, seconds) for child in children]


@dataclass(frozen=True)
class Said:
    """What a process came to: exit code and words."""

    code: int
    out: str
    err: str


def run_script(
    script: Path, *arguments: str, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> Said:
    """Run a Python file in a folder as `python FILE ...` does, without the seconds that imports take."""
    with tempfile.TemporaryDirectory() as kept:
        out, err = Path(kept) / "out", Path(kept) / "err"
        with contextlib.chdir(folder or os.getcwd()):
            code = end(start(_script, str(script.resolve()), arguments, out, err, env=env))
        return Said(code, out.read_text(), err.read_text())


def _script(script: str, arguments: tuple[str, ...], out: Path, err: Path) -> None:
    write_to(out, err)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


def write_to(out: Path, err: Path) -> None:
    """Let what this process says go to files."""
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)


def end(child: BaseProcess, seconds: float = SECONDS) -> int:
    """Wait for a process, but not for ever; its exit code, negative for a signal."""
    child.join(timeout=seconds)
    child.kill()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _enter(
    folder: str, environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*arguments)
