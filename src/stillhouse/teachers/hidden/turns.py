"""Who is computed for next, and how much may wait: requests of many clients at one model."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Turns:
    """One at a time, and each client in turn, however many requests one of them has sent.

    Example: `async with turns.of("client"): ...`
    """

    def __init__(self) -> None:
        self._busy = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By client, who is next first."""

    @contextlib.asynccontextmanager
    async def of(self, client: str) -> AsyncIterator[None]:
        """Wait for the turn of a client, and have it within the block."""
        if self._busy:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(client, deque()).append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():  # the turn has come, and nobody takes it
                    self._pass_on()
                raise
        self._busy = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        self._busy = False
        while self._waiting and not self._busy:
            client = next(iter(self._waiting))
            queue = self._waiting.pop(client)
            while queue and not self._busy:
                mine = queue.popleft()
                if not mine.done():
                    mine.set_result(None)
                    self._busy = True
            if queue:
                self._waiting[client] = queue  # behind the others


class Room:
    """Bytes that may be held at a time.

    Example: `if room.has(len(chunk)): room.take(len(chunk))`
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken = 0
        self._freed = asyncio.Event()

    def has(self, size: int) -> bool:
        """Whether there is room for so much now."""
        return self._taken + size <= self.size

    async def wait_for(self, size: int) -> None:
        """Wait until there is."""
        while not self.has(size):
            self._freed.clear()
            await self._freed.wait()

    def take(self, size: int) -> None:
        """Hold so much, or less by a negative number."""
        self._taken += size
        if size < 0:
            self._freed.set()
