"""Asks servers of hidden states: several at a time, each again elsewhere when a server fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import httpx
from torch import Tensor

from stillhouse.console import duration
from stillhouse.core.batch import TokenBatch
from stillhouse.core.head import ModelHead
from stillhouse.errors import TeacherError
from stillhouse.remote.client import in_background, is_loopback
from stillhouse.remote.replies import MAX_ERROR_BYTES
from stillhouse.remote.retries import (
    MAX_RETRY_AFTER,
    RETRIED_STATUSES,
    TransientError,
    parse_retry_after,
)
from stillhouse.teachers.hidden.protocol import (
    BIAS,
    CLIENT,
    DTYPE,
    FINGERPRINT,
    BadBody,
    ServedFacts,
    pack_request,
    unpack_tensors,
)
from stillhouse.teachers.store.codecs import DTYPES, HiddenCodec

T = TypeVar("T")

CONNECT_SECONDS = 5.0
MOST_BESIDE = 1 << 16
"""Bytes of an answer besides its tensors, and of a description."""
LONGEST_REST = 30.0
"""Seconds for which a server that failed again and again is left alone, unless it asks for more."""
LOOK_AGAIN = 0.5
"""Seconds after which it is decided anew where a waiting request goes."""


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
    http: httpx.AsyncClient
    under_way: list[float] = field(default_factory=list)
    """When each request that has no answer yet was sent."""
    pace: float = 0.0
    """Seconds of a request, a running mean; 0: it has answered none."""
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    answered: int = 0

    def seconds_for(self, more: int, now: float) -> float:
        """When it will have answered what is under way and `more` requests, by its pace so far."""
        slowest = max([self.pace, *(now - sent for sent in self.under_way[:1])])
        return slowest * (len(self.under_way) + more)


class HiddenClient:
    """Sends requests to servers of one and the same teacher.

    A request that fails (no connection, a stall beyond the timeout, an overloaded or killed server) is sent
    again, to another server where there is one, up to `retries` times; a server that fails rests, longer each
    time, and as long as it asks for (Retry-After). Each request goes where its answer is expected first, so a
    slow server gets as many as it can answer while the others work. What shows another teacher than the first
    answer is an error at once.

    Example: `HiddenClient(config, key).hidden(batch, "bfloat16")  # [N, D]`
    """

    def __init__(self, settings: HiddenSettings, key: str) -> None:
        self._settings = settings
        self._name = secrets.token_hex(8)
        self._servers = [_Server(url.rstrip("/"), self._connection(url, key)) for url in settings.url]
        self._change = asyncio.Event()
        self._waiting = 0
        self._jitter = random.Random(0)
        self._facts: ServedFacts | None = None
        self._open: set[Future[Any]] = set()
        self.retries = 0
        """Requests that were sent again."""

    def _connection(self, url: str, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}", "Accept-Encoding": "identity", CLIENT: self._name},
            timeout=httpx.Timeout(self._settings.timeout, connect=CONNECT_SECONDS, pool=None),
            trust_env=not is_loopback(url),
        )

    def _begun(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Work in the background, which `close` gives up."""
        running = in_background(work)
        self._open.add(running)
        running.add_done_callback(self._open.discard)
        return running

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
        try:
            answer = self._got(server, "/v1/teacher", MOST_BESIDE)
            return ServedFacts.of_json(json.loads(answer.content))
        except (ValueError, RecursionError) as error:
            raise TeacherError(f"{server.url}: is no server of `stillhouse serve`: {error}") from None

    def _got(self, server: _Server, path: str, most: int) -> _ServerAnswer:
        running = self._begun(self._get(server, path, most))
        try:
            return running.result()
        finally:
            running.cancel()

    async def _get(self, server: _Server, path: str, most: int) -> _ServerAnswer:
        for attempt in range(self._settings.retries + 1):
            try:
                answer = await _exchanged(server, "GET", path, most)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise TeacherError(
                    f"{server.url}: does not answer ({type(error).__name__} {error}). Start it with "
                    "`stillhouse serve TEACHER.yaml`, or mend teacher.url; `stillhouse check --no-servers` "
                    "asks none."
                ) from None
            if answer.status == 200:
                return answer
            if answer.status not in RETRIED_STATUSES or attempt == self._settings.retries:
                break
            self._failed(server, answer.retry_after)
            await asyncio.sleep(max(0.0, server.rests_until - time.monotonic()))
        raise TeacherError(_refusal(server.url, answer))

    def head(self, vocab: int) -> ModelHead:
        """The teacher's head, on the CPU.

        Raises:
            TeacherError: it cannot be had.
        """
        facts, server = self.facts, self._servers[0]
        dtype = DTYPES[facts.dtype]
        forms = {"weight": (dtype, (facts.rows, facts.width)), BIAS: (dtype, (facts.rows,))}
        try:
            most = 4 * facts.rows * (facts.width + 1) + MOST_BESIDE
            answer = self._got(server, "/v1/head", most)
            _require_teacher(server, answer, facts)
            tensors = unpack_tensors(answer.content, forms, optional=(BIAS,))
        except BadBody as error:
            raise TeacherError(f"{server.url}: the head is not one: {error}") from None
        if not all(bool(one.isfinite().all()) for one in tensors.values()):
            raise TeacherError(
                f"{server.url}: the head has numbers that are NaN or infinite. See whether the teacher's "
                "weights are whole."
            )
        return ModelHead(tensors["weight"], tensors.get(BIAS), facts.scale, facts.softcap, vocab)

    def submit(self, batch: TokenBatch, sequences: Sequence[int], codec: HiddenCodec) -> Future[list[Tensor]]:
        """Ask for some sequences of a batch: the states of each, [R, D] on the CPU, in their order."""
        facts = self.facts
        body = pack_request(batch, sequences)
        counts = [batch.row_counts[row] for row in sequences]
        return self._begun(self._asked(facts, body, counts, codec))

    async def _asked(
        self, facts: ServedFacts, body: bytes, counts: Sequence[int], codec: HiddenCodec
    ) -> list[Tensor]:
        attempt = 0
        while True:
            attempt += 1
            server, sent = await self._take()
            try:
                states = await self._attempt(server, facts, body, sum(counts), codec)
            except TransientError as error:
                self._failed(server, error.retry_after)
                if attempt > self._settings.retries:
                    raise TeacherError(
                        f"the teacher's servers gave no answer, asked {attempt} times. Last: {server.url}: "
                        f"{error}. Look whether they run; what was computed before is kept. Go on with "
                        "--resume."
                    ) from None
                self.retries += 1
                continue
            finally:
                self._release(server, sent)
            server.failures, server.answered = 0, server.answered + len(counts)
            return list(states.split(list(counts)))

    async def _attempt(
        self, server: _Server, facts: ServedFacts, body: bytes, rows: int, codec: HiddenCodec
    ) -> Tensor:
        headers = {FINGERPRINT: facts.fingerprint, DTYPE: codec.dtype}
        most = 4 * rows * (facts.width + 1) + MOST_BESIDE
        before, now = len(server.under_way), time.monotonic()
        try:
            answer = await _exchanged(server, "POST", "/v1/hidden", most, content=body, headers=headers)
        except BadBody as error:
            raise TransientError(str(error)) from None
        except httpx.TimeoutException:
            raise TransientError(f"no answer within {self._settings.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise TransientError(f"{type(error).__name__} {error}".strip()) from None
        if answer.status in RETRIED_STATUSES - {409}:
            raise TransientError(f"status {answer.status}: {answer.text}", retry_after=answer.retry_after)
        if answer.status != 200:
            raise TeacherError(_refusal(server.url, answer))
        _require_teacher(server, answer, facts)
        try:
            forms = codec.forms(rows, facts.width)
            states = await asyncio.to_thread(lambda: codec.decode(unpack_tensors(answer.content, forms)))
        except BadBody as error:
            raise TransientError(f"an answer that is not whole: {error}") from None
        if not states.isfinite().all():
            raise TeacherError(
                f"{server.url}: a hidden state of the teacher is NaN or infinite. Serve it in another dtype "
                "than float16, and see whether its weights are whole."
            )
        took = (time.monotonic() - now) / before  # it computes them one after the other
        server.pace = took if not server.pace else 0.7 * server.pace + 0.3 * took
        return states

    async def _take(self) -> tuple[_Server, float]:
        """The server that is expected to answer first, and when the request goes there; waits until it has
        room, as long as no other is expected to be faster."""
        self._waiting += 1
        try:
            while True:
                now = time.monotonic()
                chosen = self._choose(now)
                if chosen is not None:
                    chosen.under_way.append(now)
                    return chosen, now
                self._change.clear()
                resting = [one.rests_until - now for one in self._servers if one.rests_until > now]
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min([LOOK_AGAIN, *resting])):
                        await self._change.wait()
        finally:
            self._waiting -= 1

    def _choose(self, now: float) -> _Server | None:
        """Where a request should go now; None where it should wait."""
        awake = [one for one in self._servers if one.rests_until <= now]

        def has_room(one: _Server) -> bool:
            return len(one.under_way) < self._settings.concurrency

        def expected(one: _Server) -> tuple[float, int]:
            return one.seconds_for(1 if has_room(one) else self._waiting, now), len(one.under_way)

        chosen = min(awake, key=expected, default=None)
        return chosen if chosen is not None and has_room(chosen) else None

    def _release(self, server: _Server, sent: float) -> None:
        server.under_way.remove(sent)
        self._change.set()

    def _failed(self, server: _Server, retry_after: float | None) -> None:
        """Leave a server alone for a while.

        Raises:
            TeacherError: it asks for longer than anyone would wait.
        """
        server.failures += 1
        if retry_after is not None and retry_after > MAX_RETRY_AFTER:
            raise TeacherError(
                f"{server.url}: asks to wait {duration(retry_after)}. Start again then, with --resume."
            )
        rest = min(LONGEST_REST, 0.25 * 2.0 ** (server.failures - 1)) * self._jitter.uniform(0.5, 1.0)
        server.rests_until = time.monotonic() + max(rest, retry_after or 0.0)

    def counts(self) -> dict[str, int]:
        """Sequences that each server answered, by its URL."""
        return {server.url: server.answered for server in self._servers}

    def close(self) -> None:
        """Let go of the connections; requests under way are given up."""
        for running in list(self._open):
            running.cancel()
        with contextlib.suppress(CancelledError):
            in_background(self._disconnected()).result()

    async def _disconnected(self) -> None:
        for server in self._servers:
            with contextlib.suppress(httpx.HTTPError):
                await server.http.aclose()


@dataclass(frozen=True, slots=True)
class _ServerAnswer:
    status: int
    fingerprint: str | None
    retry_after: float | None
    location: str | None
    """Where a redirection leads."""
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")[:200]


async def _exchanged(server: _Server, method: str, path: str, most: int, **sent: Any) -> _ServerAnswer:
    """One request and its answer, of which no more than `most` bytes are taken.

    Raises:
        BadBody: it has more.
        httpx.HTTPError: there is none.
    """
    async with server.http.stream(method, f"{server.url}{path}", **sent) as response:
        limit = most if response.status_code == 200 else MAX_ERROR_BYTES
        content = bytearray()
        async for chunk in response.aiter_raw():  # packed bodies are not asked for, and could grow for ever
            content += chunk
            if len(content) > limit:
                raise BadBody(f"{path} answers with more than {limit:,} bytes")
        headers = response.headers
        return _ServerAnswer(
            response.status_code,
            headers.get(FINGERPRINT),
            parse_retry_after(headers),
            headers.get("location") if response.is_redirect else None,
            bytes(content),
        )


def _require_teacher(server: _Server, answer: _ServerAnswer, facts: ServedFacts) -> None:
    """Refuse an answer of another teacher.

    Raises:
        TeacherError: it is of one, or says of none.
    """
    if answer.fingerprint is None:
        raise TeacherError(f"{server.url}: an answer names no teacher. Is it a server of `stillhouse serve`?")
    if answer.fingerprint != facts.fingerprint:
        raise TeacherError(
            f"{server.url}: an answer is of teacher {answer.fingerprint[:40]}, not {facts.fingerprint}: it "
            "has other weights than this run began with. Start that teacher again, or a new run."
        )


def _refusal(url: str, answer: _ServerAnswer) -> str:
    try:
        said = str(json.loads(answer.content)["error"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = answer.text
    advice = {
        401: " teacher.key_env must name the variable that holds the server's key.",
        404: " Is it a server of `stillhouse serve`?",
        409: " It has other weights than this run began with: start that teacher again, or a new run.",
        413: " Lower teacher.request_tokens.",
    }.get(answer.status, "")
    if answer.location is not None:
        advice = f" It says that it is at {answer.location[:200]}; correct teacher.url."
    told = f": {said.rstrip('.')}" if said.strip() else ""
    return f"{url}: refused with status {answer.status}{told}.{advice}"
