"""Processes of their own for tests that kill, limit or interrupt, ready at once.

They are forked from a server that has imported everything and computed nothing. A fork of the test process
itself would inherit whatever locks its threads hold at that moment (of an allocator, of torch's thread pool)
and now and then hang or fail.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

from tests.conftest import ROOT

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
