"""An HTTP client for OpenAI-compatible servers: bounded concurrency, retries with backoff, token usage."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import itertools
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
from tenacity import AsyncRetrying, RetryCallState, RetryError, retry_if_exception_type

from stillhouse.console import duration
from stillhouse.errors import RequestRejected, ServerError, StillhouseError
from stillhouse.remote.answers import InvalidAnswer, answer_limit
from stillhouse.remote.replies import (
    ENCODINGS,
    RequestBody,
    error_message,
    not_an_answer_message,
    received,
    shorten,
    token_usage,
)
from stillhouse.remote.retries import (
    MAX_RETRY_AFTER,
    RETRIED_STATUSES,
    UNREACHABLE_STATUSES,
    Backoff,
    TransientError,
    exhausted_message,
    failure_of,
    parse_retry_after,
)

T = TypeVar("T")

logger = logging.getLogger("stillhouse")

LOGGED_WAIT = 10.0
"""Seconds of backoff from which on a retry is logged, and the least between two such lines."""
FIRST_CONTACT = 5.0
"""Seconds within which a server must have answered anything at all, if only that it is busy; an outage later
is waited for as the connection's `retries` say."""


Reader = Callable[[Any, RequestBody], T]
"""From decoded JSON, and the body to which it is the answer, to a result."""


class ServerSettings(Protocol):
    """What a client must know of its server; a `ServerConnection` has it."""

    @property
    def url(self) -> str: ...

    @property
    def concurrency(self) -> int: ...

    @property
    def retries(self) -> int: ...

    @property
    def timeout(self) -> float: ...

    @property
    def backoff(self) -> float: ...


@dataclass
class Usage:
    """What a client has requested so far.

    Example: `Usage(requests=52, retries=2, prompt_tokens=150, completion_tokens=50)`
    """

    requests: int = 0
    """Requests sent, retries included."""
    retries: int = 0
    prompt_tokens: int = 0
    """As the server counted them, in responses that were used."""
    completion_tokens: int = 0


class Client:
    """Sends requests to an OpenAI-compatible server from a background thread.

    Rate limits (429, Retry-After), errors of the server (5xx), timeouts, dropped connections and incomplete
    responses are retried with exponential backoff and jitter; anything else is an error at once. Every
    request gets one response or the call raises. A retry may make the server work twice, because nobody can
    know whether a lost response was computed; it never gives two results.

    Example:
        >>> client = ServerConnection(url="http://127.0.0.1:8000/v1").client()
        >>> bodies = [{"model": "m", "prompt": p, "max_tokens": 8} for p in ("a", "b")]
        >>> for index, text in client.request_many("completions", bodies, lambda r: r["choices"][0]["text"]):
        ...     print(index, text)
    """

    def __init__(self, server: ServerSettings, api_key: str | None = None) -> None:
        """Nothing is sent yet.

        Args:
            server: where it is, and how to ask it; the url is with or without the final /v1.
            api_key: sent as bearer token; it stays out of every message.
        """
        self.root = server.url.rstrip("/").removesuffix("/v1")
        self.url = f"{self.root}/v1"
        self.usage = Usage()
        self._server = server
        self._api_key = api_key
        self._http: httpx.AsyncClient | None = None
        self._request_numbers = itertools.count()
        self._rate_limited_until = 0.0
        self._logged_at = -LOGGED_WAIT
        self._reached = False

    def request(
        self, path: str, body: RequestBody | None = None, parse: Callable[[Any], T] | None = None
    ) -> T:
        """The result of one request; see `request_many`. Without a body it is a GET."""
        ((_, result),) = self._results(path, [body], _of_reply(parse))
        return result

    def request_many(
        self, path: str, bodies: Sequence[RequestBody], parse: Callable[[Any], T] | None = None
    ) -> Iterator[tuple[int, T]]:
        """Post all bodies; (index, result) as the responses arrive.

        When the iterator is left early (also by Ctrl-C), requests in flight are cancelled and their
        connections closed.

        Args:
            path: below /v1, such as "completions"; with a leading "/" below the server's root.
            bodies: one JSON object for each request.
            parse: turns the decoded JSON into the result. KeyError, IndexError, AttributeError, TypeError and
                ValueError in it mean that the response is incomplete, and the request is retried;
                `InvalidAnswer` that it is not one to what was asked, and nothing is.

        Raises:
            RequestRejected: the server rejected a request. Results that came before have been given.
            ServerError: a request failed, retries included.
        """
        return self._results(path, bodies, _of_reply(parse))

    def exchange(
        self, path: str, bodies: Sequence[RequestBody], read: Callable[[Any, RequestBody], T]
    ) -> Iterator[tuple[int, T]]:
        """As `request_many`, with a `read` that also gets the body to which the JSON is the answer.

        Raises:
            ServerError: `read` raised `InvalidAnswer`: the answer is not one to what was asked.
        """
        return self._results(path, bodies, read)

    def request_if_supported(
        self, path: str, body: RequestBody | None = None, parse: Callable[[Any], T] | None = None
    ) -> T | None:
        """The result of a request that the server may not support; None where it is rejected.

        Raises:
            ServerError: the request failed, retries included.
        """
        try:
            return self.request(path, body, parse)
        except RequestRejected:
            return None

    def reach(self) -> None:
        """See whether there is a server; whatever it says will do.

        Raises:
            ServerError: it does not answer within some seconds.
        """
        try:
            self.request_if_supported("models")
        except ServerError:
            if not self._reached:
                raise

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        if self._http is not None:
            http, self._http = self._http, None
            in_background(http.aclose()).result()

    def _results(
        self, path: str, bodies: Sequence[RequestBody | None], read: Reader[T]
    ) -> Iterator[tuple[int, T]]:
        url = f"{self.root}{path}" if path.startswith("/") else f"{self.url}/{path}"
        results: queue.SimpleQueue[tuple[int, Any] | Future[None]] = queue.SimpleQueue()
        running = in_background(self._run_workers(url, bodies, read, results.put))
        running.add_done_callback(results.put)
        try:
            while not isinstance(item := results.get(), Future):
                yield item
            item.result()
        finally:
            running.cancel()

    async def _run_workers(
        self,
        url: str,
        bodies: Sequence[RequestBody | None],
        read: Reader[Any],
        emit: Callable[[tuple[int, Any]], None],
    ) -> None:
        """`concurrency` workers share the bodies; after an error none sends a new one, but those in flight
        are waited for: they may be paid for."""
        pending = iter(enumerate(bodies))
        errors: list[StillhouseError] = []

        async def work() -> None:
            for index, body in pending:
                try:
                    emit((index, await self._request(url, body, read)))
                except StillhouseError as error:
                    errors.append(error)
                if errors:
                    return

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(self._server.concurrency, len(bodies))):
                workers.create_task(work())
        if errors:
            raise errors[0]

    async def _request(self, url: str, body: RequestBody | None, read: Reader[T]) -> T:
        start, failures = time.monotonic(), list[TransientError]()
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientError),
            stop=self._gives_up,
            wait=Backoff(self._server.backoff, seed=next(self._request_numbers)),
            after=lambda state: failures.append(failure_of(state)),
            before_sleep=lambda state: self._before_retry(url, state),
        )
        try:
            return await retrying(self._attempt, url, body, read)
        except RetryError:
            raise ServerError(exhausted_message(url, failures, time.monotonic() - start)) from None

    async def _attempt(self, url: str, body: RequestBody | None, read: Reader[T]) -> T:
        while (rest := self._rate_limited_until - time.monotonic()) > 0:
            await asyncio.sleep(rest)
        self.usage.requests += 1
        response = await self._send(url, body)
        self._reached |= response.status_code not in UNREACHABLE_STATUSES
        if response.status_code != 200:
            raise self._status_error(url, response)
        try:
            reply = response.json()
            result = read(reply, body or {})
            prompt_tokens, completion_tokens = token_usage(reply)
        except StillhouseError:
            raise
        except InvalidAnswer as error:
            raise ServerError(self._redact(not_an_answer_message(url, body, error))) from None
        except RecursionError:
            raise ServerError(f"{url}: answers with JSON that is nested too deeply to be one.") from None
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            garbled = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
            kind = "an answer that is not whole JSON" if garbled else "an unexpected answer"
            detail = self._redact(f"{type(error).__name__} {error}; got {shorten(response.text)}")
            raise TransientError(kind, detail) from None
        self.usage.prompt_tokens += prompt_tokens
        self.usage.completion_tokens += completion_tokens
        return result

    def _gives_up(self, state: RetryCallState) -> bool:
        failure, waited = failure_of(state), (state.seconds_since_start or 0.0) + state.upcoming_sleep
        return (
            state.attempt_number > self._server.retries
            or (failure.retry_after or 0.0) > MAX_RETRY_AFTER
            or (not self._reached and failure.unreachable and waited > FIRST_CONTACT)
        )

    def _before_retry(self, url: str, state: RetryCallState) -> None:
        failure, wait = failure_of(state), state.upcoming_sleep
        now = time.monotonic()
        self.usage.retries += 1
        if failure.retry_after is not None:  # the limit is on all of this client's requests
            self._rate_limited_until = max(self._rate_limited_until, now + failure.retry_after)
        if wait >= LOGGED_WAIT and now - self._logged_at >= LOGGED_WAIT:
            self._logged_at = now
            logger.warning("%s: %s; retrying in %s", url, failure.kind, duration(wait))

    async def _send(self, url: str, body: RequestBody | None) -> httpx.Response:
        if self._http is None:
            self._http = self._connect()
        timeout = self._server.timeout
        if body is None and not self._reached:
            timeout = min(timeout, FIRST_CONTACT)
        try:
            async with asyncio.timeout(timeout):  # that of httpx restarts with every byte
                method = "GET" if body is None else "POST"
                async with self._http.stream(method, url, json=body) as response:
                    return await received(response, answer_limit(body))
        except UnicodeEncodeError as error:
            raise RequestRejected(
                f"{url}: a prompt with half a character cannot be sent ({error.reason})."
            ) from None
        except (httpx.TimeoutException, TimeoutError) as error:
            raise TransientError(f"no answer within {timeout:g} s", unreachable=True) from error
        except httpx.ConnectError as error:
            raise TransientError("no connection", str(error), unreachable=True) from error
        except httpx.InvalidURL as error:
            raise RequestRejected(f"{url}: is no URL ({error}).") from error
        except httpx.HTTPError as error:
            detail = f"{type(error).__name__} {error}".strip()
            raise TransientError("a broken connection", detail, unreachable=True) from error

    def _status_error(self, url: str, response: httpx.Response) -> Exception:
        status = f"status {response.status_code} {response.reason_phrase}".strip()
        message = self._redact(error_message(response))
        if response.status_code in RETRIED_STATUSES:
            gone = response.status_code in UNREACHABLE_STATUSES
            return TransientError(status, message, parse_retry_after(response.headers), unreachable=gone)
        advice = {
            401: " The key is missing or wrong: key_env must name a variable that holds it.",
            403: " The key may not do this: key_env must name a variable that holds one that may.",
            404: " Look at url, and at the name in model: a server knows a model under one name only.",
        }.get(response.status_code, "")
        if response.is_redirect:
            advice = f" It says that the API is at {self._redact(response.headers['location'])}; correct url."
        return RequestRejected(f"{url}: rejected with {status}: {message.rstrip('.')}.{advice}")

    def _connect(self) -> httpx.AsyncClient:
        timeout, concurrency = self._server.timeout, self._server.concurrency
        authorization = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        return httpx.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": ", ".join(ENCODINGS), **authorization},
            timeout=httpx.Timeout(timeout, connect=min(timeout, FIRST_CONTACT), pool=None),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            trust_env=not is_loopback(self.root),  # a proxy cannot reach this machine's own loopback
        )

    def _redact(self, text: str) -> str:
        """Some servers repeat the key in their errors."""
        return text.replace(self._api_key, "[key]") if self._api_key else text


def _of_reply(parse: Callable[[Any], T] | None) -> Reader[T]:
    """A reader that does not look at what was asked."""
    return lambda reply, body: reply if parse is None else parse(reply)


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this very machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def in_background(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in the background thread; cancelling the future cancels it and closes what it holds."""
    return asyncio.run_coroutine_threadsafe(work, _event_loop(os.getpid()))


@functools.cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    """One loop in a thread of its own, so that requests run while the caller works, also in a notebook that
    has a loop already. By process: a forked child has the parent's memory but not its threads."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="stillhouse-http", daemon=True).start()
    return loop
