"""One event loop in a thread of its own, so that requests run beside whatever the caller does, also in a
notebook that has a loop already."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def start(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in the background; cancelling the future cancels it and closes what it holds."""
    return asyncio.run_coroutine_threadsafe(work, _loop(os.getpid()))


@functools.cache
def _loop(pid: int) -> asyncio.AbstractEventLoop:
    # By process: a forked child has the parent's memory but not its threads.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="stillhouse-http", daemon=True).start()
    return loop
