"""Asks servers of hidden states: several at a time, each again elsewhere when a server fails."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from torch import Tensor

from stillhouse.core.batch import TokenBatch
from stillhouse.core.head import ModelHead
from stillhouse.errors import TeacherError
from stillhouse.remote.client import is_loopback
from stillhouse.remote.replies import MAX_ERROR_BYTES
from stillhouse.remote.retries import RETRIED_STATUSES, TransientError
from stillhouse.teachers.hidden.protocol import (
    BIAS,
    DTYPE,
    FINGERPRINT,
    BadBody,
    ServedFacts,
    pack_request,
    unpack_tensors,
)
from stillhouse.teachers.store.codecs import DTYPES, HiddenCodec

CONNECT_SECONDS = 5.0
MOST_BESIDE = 1 << 16
"""Bytes of an answer besides its tensors, and of a description."""
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
            headers={"Authorization": f"Bearer {key}", "Accept-Encoding": "identity"},
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
        try:
            return ServedFacts.of_json(json.loads(self._get(server, "/v1/teacher", MOST_BESIDE)))
        except (ValueError, RecursionError) as error:
            raise TeacherError(f"{server.url}: is no server of `stillhouse serve`: {error}") from None

    def _get(self, server: _Server, path: str, most: int) -> bytes:
        try:
            answer = _exchanged(server, "GET", path, most)
        except httpx.HTTPError as error:
            raise TeacherError(
                f"{server.url}: does not answer ({type(error).__name__} {error}). Start it with `stillhouse "
                "serve TEACHER.yaml`, or mend teacher.url; `stillhouse check --no-servers` asks none."
            ) from None
        if answer.status != 200:
            raise TeacherError(_refusal(server.url, answer))
        return answer.content

    def head(self, vocab: int) -> ModelHead:
        """The teacher's head, on the CPU.

        Raises:
            TeacherError: it cannot be had.
        """
        facts = self.facts
        dtype = DTYPES[facts.dtype]
        forms = {"weight": (dtype, (facts.rows, facts.width)), BIAS: (dtype, (facts.rows,))}
        try:
            body = self._get(self._servers[0], "/v1/head", 4 * facts.rows * (facts.width + 1) + MOST_BESIDE)
            tensors = unpack_tensors(body, forms, optional=(BIAS,))
        except BadBody as error:
            raise TeacherError(f"{self._servers[0].url}: the head is not one: {error}") from None
        return ModelHead(tensors["weight"], tensors.get(BIAS), facts.scale, facts.softcap, vocab)

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
        most = 4 * rows * (facts.width + 1) + MOST_BESIDE
        try:
            answer = _exchanged(server, "POST", "/v1/hidden", most, content=body, headers=headers)
        except BadBody as error:
            raise TransientError(str(error)) from None
        except httpx.TimeoutException:
            raise TransientError(f"no answer within {self._settings.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise TransientError(f"{type(error).__name__} {error}".strip()) from None
        if answer.status in RETRIED_STATUSES - {409}:
            raise TransientError(f"status {answer.status}: {answer.text}")
        if answer.status != 200:
            raise TeacherError(_refusal(server.url, answer))
        if answer.fingerprint != facts.fingerprint:
            raise TeacherError(
                f"{server.url}: an answer names no teacher. Is it a server of `stillhouse serve`?"
            )
        try:
            states = codec.decode(unpack_tensors(answer.content, codec.forms(rows, facts.width)))
        except BadBody as error:
            raise TransientError(f"an answer that is not whole: {error}") from None
        if not states.isfinite().all():
            raise TeacherError(
                f"{server.url}: a hidden state of the teacher is NaN or infinite. Serve it in another dtype "
                "than float16, and see whether its weights are whole."
            )
        return states

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


@dataclass(frozen=True, slots=True)
class _ServerAnswer:
    status: int
    fingerprint: str | None
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")[:200]


def _exchanged(server: _Server, method: str, path: str, most: int, **sent: Any) -> _ServerAnswer:
    """One request and its answer, of which no more than `most` bytes are taken.

    Raises:
        BadBody: it has more.
        httpx.HTTPError: there is none.
    """
    with server.http.stream(method, f"{server.url}{path}", **sent) as response:
        limit = most if response.status_code == 200 else MAX_ERROR_BYTES
        content = bytearray()
        for chunk in response.iter_raw():  # packed bodies are not asked for, and could grow without end
            content += chunk
            if len(content) > limit:
                raise BadBody(f"{path} answers with more than {limit:,} bytes")
        return _ServerAnswer(response.status_code, response.headers.get(FINGERPRINT), bytes(content))


def _refusal(url: str, answer: _ServerAnswer) -> str:
    try:
        said = str(json.loads(answer.content)["error"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = answer.text
    advice = {
        401: " teacher.key_env must name the variable that holds the server's key.",
        404: " Is it a server of `stillhouse serve`?",
        409: " It has other weights than this run began with: start that teacher again, or a new run.",
    }.get(answer.status, "")
    return f"{url}: refused with status {answer.status}: {said}.{advice}"
