"""Asks servers of hidden states: several at a time, each again elsewhere when a server fails."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import httpx
from torch import Tensor

from stillhouse.core.batch import TokenBatch
from stillhouse.core.head import ModelHead
from stillhouse.errors import TeacherError
from stillhouse.remote.client import is_loopback
from stillhouse.remote.retries import RETRIED_STATUSES, TransientError
from stillhouse.teachers.hidden.protocol import (
    DTYPE,
    FINGERPRINT,
    BadBody,
    ServedFacts,
    pack_request,
    unpack_tensors,
)
from stillhouse.teachers.store.codecs import HiddenCodec

CONNECT_SECONDS = 5.0
LONGEST_REST = 30.0
"""Seconds for which a server that failed again and again is left alone."""


class HiddenSettings(Protocol):
    """How to ask; a `RemoteTeacherConfig` has it."""

    @property
    def url(self) -> tuple[str, ...]: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def retries(self) -> int: ...
    @property
    def timeout(self) -> float: ...


@dataclass(eq=False)
class _Server:
    """One of the servers, and how it fares."""

    url: str
    http: httpx.Client
    busy: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    answered: int = 0
    errors: list[str] = field(default_factory=list)


class HiddenClient:
    """Sends requests to servers of one and the same teacher.

    A request that fails (no connection, a stall beyond the timeout, an overloaded or killed server) is sent
    again, to another server where there is one, up to `retries` times; a server that fails rests, longer each
    time. What shows another teacher than the first answer is an error at once.

    Example: `HiddenClient(config, key).hidden(batch, "bfloat16")  # [N, D]`
    """

    def __init__(self, settings: HiddenSettings, key: str) -> None:
        self._settings = settings
        self._servers = [_Server(url.rstrip("/"), self._connection(url, key)) for url in settings.url]
        self._change = threading.Condition()
        self._pool = ThreadPoolExecutor(
            settings.concurrency * len(self._servers), thread_name_prefix="stillhouse-teacher"
        )
        self._jitter = random.Random(0)
        self._facts: ServedFacts | None = None
        self.retries = 0
        """Requests that were sent again."""

    def _connection(self, url: str, key: str) -> httpx.Client:
        return httpx.Client(
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(self._settings.timeout, connect=CONNECT_SECONDS, pool=None),
            trust_env=not is_loopback(url),
        )

    @property
    def facts(self) -> ServedFacts:
        """What the servers say about their teacher; asked for once.

        Raises:
            TeacherError: one of them does not answer, or has another teacher than the others.
        """
        if self._facts is None:
            found = {server.url: self._describe(server) for server in self._servers}
            first = next(iter(found.values()))
            if other := [url for url, facts in found.items() if facts != first]:
                raise TeacherError(
                    f"{other[0]}: serves {found[other[0]].path} ({found[other[0]].fingerprint}), and "
                    f"{self._servers[0].url} {first.path} ({first.fingerprint}). The servers of a teacher "
                    "must serve the same weights in the same dtype."
                )
            self._facts = first
        return self._facts

    def _describe(self, server: _Server) -> ServedFacts:
        response = self._get(server, "/v1/teacher")
        try:
            return ServedFacts.of_json(response.json())
        except ValueError as error:
            raise TeacherError(f"{server.url}: is no server of `stillhouse serve`: {error}") from None

    def _get(self, server: _Server, path: str) -> httpx.Response:
        try:
            response = server.http.get(f"{server.url}{path}")
        except httpx.HTTPError as error:
            raise TeacherError(
                f"{server.url}: does not answer ({type(error).__name__} {error}). Start it with `stillhouse "
                "serve TEACHER.yaml`, or mend teacher.url."
            ) from None
        if response.status_code != 200:
            raise TeacherError(_refusal(server.url, response))
        return response

    def head(self, vocab: int) -> ModelHead:
        """The teacher's head, on the CPU.

        Raises:
            TeacherError: it cannot be had.
        """
        facts = self.facts
        body = self._get(self._servers[0], "/v1/head").content
        shapes: dict[str, tuple[int, ...]] = {"weight": (facts.rows, facts.width)}
        try:
            tensors = unpack_tensors(body, shapes)
        except BadBody:
            try:
                tensors = unpack_tensors(body, {**shapes, "bias": (facts.rows,)})
            except BadBody as error:
                raise TeacherError(f"{self._servers[0].url}: the head is not one: {error}") from None
        return ModelHead(tensors["weight"], tensors.get("bias"), facts.scale, facts.softcap, vocab)

    def submit(self, batch: TokenBatch, sequences: Sequence[int], codec: HiddenCodec) -> Future[list[Tensor]]:
        """Ask for some sequences of a batch: the states of each, [R, D] on the CPU, in their order."""
        body = pack_request(batch, sequences)
        counts = [batch.row_counts[row] for row in sequences]
        return self._pool.submit(self._asked, body, counts, codec)

    def _asked(self, body: bytes, counts: Sequence[int], codec: HiddenCodec) -> list[Tensor]:
        failures: list[str] = []
        for attempt in itertools.count():
            server = self._take()
            try:
                states = self._attempt(server, body, sum(counts), codec)
            except TransientError as error:
                failures.append(f"{server.url}: {error}")
                self._failed(server)
                if attempt >= self._settings.retries:
                    raise TeacherError(
                        f"the teacher's servers gave no answer, asked {attempt + 1} times. Last: "
                        f"{failures[-1]}. Look whether they run; what was computed before is kept. Go on "
                        "with --resume."
                    ) from None
                self.retries += 1
                continue
            finally:
                self._release(server)
            server.failures, server.answered = 0, server.answered + len(counts)
            return list(states.split(list(counts)))
        raise AssertionError

    def _attempt(self, server: _Server, body: bytes, rows: int, codec: HiddenCodec) -> Tensor:
        facts = self.facts
        headers = {FINGERPRINT: facts.fingerprint, DTYPE: codec.dtype}
        try:
            response = server.http.post(f"{server.url}/v1/hidden", content=body, headers=headers)
        except httpx.TimeoutException:
            raise TransientError(f"no answer within {self._settings.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise TransientError(f"{type(error).__name__} {error}".strip()) from None
        if response.status_code in RETRIED_STATUSES - {409}:
            raise TransientError(f"status {response.status_code}: {response.text[:200]}")
        if response.status_code != 200:
            raise TeacherError(_refusal(server.url, response))
        if response.headers.get(FINGERPRINT) != facts.fingerprint:
            raise TeacherError(
                f"{server.url}: an answer names no teacher. Is it a server of `stillhouse serve`?"
            )
        shape = (rows, facts.width)
        shapes = {"codes": shape, "scale": (rows,)} if codec.dtype == "int8" else {"hidden": shape}
        try:
            return codec.decode(unpack_tensors(response.content, shapes))
        except BadBody as error:
            raise TransientError(f"an answer that is not whole: {error}") from None

    def _take(self) -> _Server:
        """The server with the fewest requests among those that do not rest; waits for one."""
        with self._change:
            while True:
                now = time.monotonic()
                able = [
                    one
                    for one in self._servers
                    if one.rests_until <= now and one.busy < self._settings.concurrency
                ]
                if able:
                    chosen = min(able, key=lambda one: one.busy)
                    chosen.busy += 1
                    return chosen
                resting = [one.rests_until - now for one in self._servers if one.rests_until > now]
                self._change.wait(min(resting, default=1.0))

    def _release(self, server: _Server) -> None:
        with self._change:
            server.busy -= 1
            self._change.notify_all()

    def _failed(self, server: _Server) -> None:
        with self._change:
            server.failures += 1
            rest = min(LONGEST_REST, 0.25 * 2.0 ** (server.failures - 1))
            server.rests_until = time.monotonic() + rest * self._jitter.uniform(0.5, 1.0)

    def counts(self) -> dict[str, int]:
        """Sequences that each server answered, by its URL."""
        return {server.url: server.answered for server in self._servers}

    def close(self) -> None:
        """Let go of the connections; requests under way are given up."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for server in self._servers:
            with contextlib.suppress(httpx.HTTPError):
                server.http.close()


def _refusal(url: str, response: httpx.Response) -> str:
    try:
        said = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        said = response.text[:200]
    advice = {
        401: " teacher.key_env must name the variable that holds the server's key.",
        404: " Is it a server of `stillhouse serve`?",
        409: " It has other weights than this run began with: start that teacher again, or a new run.",
    }.get(response.status_code, "")
    return f"{url}: refused with status {response.status_code}: {said}.{advice}"
