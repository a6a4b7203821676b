"""ListOf requests to one server at a time, each repeated until it is answered or hopeless."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import json
import logging
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from stillhouse.console import duration
from stillhouse.errors import EngineError, EnvironmentFault, StillhouseError
from stillhouse.remote import loop
from stillhouse.remote.retry import (
    LONGEST_ORDERED_WAIT,
    TRANSIENT,
    Again,
    Refused,
    gave_up,
    pause,
    retry_after,
)

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Body = Mapping[str, Any]

logger = logging.getLogger("stillhouse")

WORTH_TELLING = 10.0
"""Seconds of waiting from which on a person is told, and between two such lines."""


@dataclass
class Counts:
    """What a client has asked for so far."""

    requests: int = 0
    """Requests sent, repetitions included."""
    retries: int = 0
    """Repetitions among them."""
    prompt_tokens: int = 0
    """As the server counted them, in answers that were used."""
    completion_tokens: int = 0


class Client:
    """Sends requests to an OpenAI-compatible server from a background thread.

    Rate limits (429, Retry-After), errors of the server (5xx), time-outs, dropped connections and answers
    that are not whole are tried again with exponential back-off; anything else is an error at once. Every
    request is answered once or the call raises. A repetition may make the server work twice, because nobody
    can know whether a lost answer was computed; it never gives two answers.

    Example:
        >>> client = Client("http://127.0.0.1:8000/v1", concurrency=16)
        >>> bodies = [{"model": "m", "prompt": p, "max_tokens": 8} for p in ("a", "b")]
        >>> for index, text in client.each("completions", bodies, lambda reply: reply["choices"][0]["text"]):
        ...     print(index, text)
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        concurrency: int = 16,
        retries: int = 8,
        timeout: float = 300.0,
        backoff: float = 0.5,
        failure: Callable[[str], StillhouseError] = EngineError,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: base of the API, with or without the final /v1.
            key: sent as bearer token; it stays out of every message.
            concurrency: most requests under way at a time.
            retries: most repetitions of one request.
            timeout: seconds to wait for a whole answer.
            backoff: seconds before the first repetition; doubled each time, up to a minute.
            failure: the error to raise when the server does not answer or refuses.
        """
        url = url.rstrip("/")
        self.root = url.removesuffix("/v1")
        self.url = f"{self.root}/v1"
        self.counts = Counts()
        self._key = key
        self._concurrency = concurrency
        self._retries = retries
        self._timeout = timeout
        self._backoff = backoff
        self.failure = failure
        self._http: httpx.AsyncClient | None = None
        self._numbers = itertools.count()
        self._quiet_until = 0.0
        self._told_at = -WORTH_TELLING

    def ask(self, path: str, body: Body | None = None, read: Callable[[Any], T] | None = None) -> T:
        """One answer; see `each`. Without a body the request is a GET."""
        ((_, answer),) = self._run(path, [body], read)
        return answer

    def each(
        self, path: str, bodies: Sequence[Body], read: Callable[[Any], T] | None = None
    ) -> Iterator[tuple[int, T]]:
        """Post all bodies; (index, answer) as the answers come.

        When the iterator is left early (also by Ctrl-C), what is under way is dropped and its connection
        closed.

        Args:
            path: below /v1, such as "completions"; with a leading "/" below the server's root.
            bodies: one JSON object for each request.
            read: takes the decoded JSON apart. KeyError, IndexError, AttributeError, TypeError and ValueError
                of it mean that the answer is not whole, and the request is sent again.

        Raises:
            EngineError: (or `failure`) a request was refused, or not answered within the retries. What was
                answered until then has been given.
        """
        return self._run(path, bodies, read)

    def allowed(
        self, path: str, body: Body | None = None, read: Callable[[Any], T] | None = None
    ) -> T | None:
        """The answer to a question that the server may not know; None where it refuses. See `each`.

        Raises:
            EngineError: (or `failure`) it does not answer.
        """
        try:
            return self.ask(path, body, read)
        except StillhouseError as error:
            if isinstance(error.__cause__, Refused):
                return None
            raise

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        if self._http is not None:
            http, self._http = self._http, None
            loop.start(http.aclose()).result()

    def _run(
        self, path: str, bodies: Sequence[Body | None], read: Callable[[Any], T] | None
    ) -> Iterator[tuple[int, T]]:
        url = f"{self.root}{path}" if path.startswith("/") else f"{self.url}/{path}"
        answers: queue.SimpleQueue[tuple[int, Any] | Future[None]] = queue.SimpleQueue()
        running = loop.start(self._work(url, bodies, read or (lambda reply: reply), answers.put))
        running.add_done_callback(answers.put)
        try:
            while not isinstance(item := answers.get(), Future):
                yield item
            item.result()
        finally:
            running.cancel()

    async def _work(
        self,
        url: str,
        bodies: Sequence[Body | None],
        read: Callable[[Any], Any],
        give: Callable[[tuple[int, Any]], None],
    ) -> None:
        """Some workers that share the bodies; after a failure none begins a new one."""
        waiting = iter(enumerate(bodies))
        failed: list[StillhouseError] = []

        async def worker() -> None:
            for index, body in waiting:
                try:
                    give((index, await self._answer(url, body, read)))
                except StillhouseError as error:
                    failed.append(error)
                if failed:
                    return

        await asyncio.gather(*(worker() for _ in range(min(self._concurrency, len(bodies)))))
        if failed:
            raise failed[0]

    async def _answer(self, url: str, body: Body | None, read: Callable[[Any], T]) -> T:
        began, faults = time.monotonic(), Counter[str]()
        source = str(next(self._numbers))
        for attempt in itertools.count():
            while (quiet := self._quiet_until - time.monotonic()) > 0:
                await asyncio.sleep(quiet)
            self.counts.requests += 1
            self.counts.retries += attempt > 0
            try:
                return await self._try(url, body, read)
            except Refused as refusal:
                raise self.failure(str(refusal)) from refusal
            except Again as fault:
                faults[fault.what] += 1
                hopeless = (fault.after or 0.0) > LONGEST_ORDERED_WAIT
                if attempt >= self._retries or hopeless:
                    seconds = time.monotonic() - began
                    raise self.failure(gave_up(url, faults, fault, seconds)) from None
                seconds = pause(fault, attempt, self._backoff, source)
                if fault.after is not None:  # meant for all of this client's requests, not this one alone
                    self._quiet_until = max(self._quiet_until, time.monotonic() + fault.after)
                self._tell(url, fault, seconds)
            await asyncio.sleep(seconds)
        raise AssertionError("unreachable")

    async def _try(self, url: str, body: Body | None, read: Callable[[Any], T]) -> T:
        response = await self._send(url, body)
        if response.status_code != 200:
            raise self._refusal(url, response)
        try:
            reply = response.json()
            answer = read(reply)
            used = _used(reply)
        except StillhouseError:
            raise
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            garbled = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
            what = "an answer that is not whole JSON" if garbled else "an unexpected answer"
            detail = self._safe(f"{type(error).__name__} {error}; got {_short(response.text)}")
            raise Again(what, detail) from None
        self.counts.prompt_tokens += used[0]
        self.counts.completion_tokens += used[1]
        return answer

    async def _send(self, url: str, body: Body | None) -> httpx.Response:
        import httpx

        if self._http is None:
            self._http = self._connect()
        try:
            async with asyncio.timeout(self._timeout):  # that of httpx begins anew with every byte
                if body is None:
                    return await self._http.get(url)
                return await self._http.post(url, json=body)
        except UnicodeEncodeError as error:
            raise Refused(f"{url}: a prompt with half a character cannot be sent ({error.reason}).") from None
        except (httpx.TimeoutException, TimeoutError) as error:
            raise Again(f"no answer within {self._timeout:g} s") from error
        except httpx.ConnectError as error:
            raise Again("no connection", str(error)) from error
        except httpx.InvalidURL as error:
            raise Refused(f"{url}: is no URL ({error}).") from error
        except httpx.HTTPError as error:
            raise Again("a broken connection", f"{type(error).__name__} {error}".strip()) from error

    def _refusal(self, url: str, response: httpx.Response) -> Exception:
        status = f"status {response.status_code} {response.reason_phrase}".strip()
        words = self._safe(_words(response))
        if response.status_code in TRANSIENT:
            return Again(status, words, retry_after(response.headers))
        advice = {
            401: " The key is missing or wrong: key_env must name a variable that holds it.",
            403: " The key may not do this: key_env must name a variable that holds one that may.",
            404: " Look at url, and at the name in model: a server knows a model under one name only.",
        }.get(response.status_code, "")
        if response.is_redirect:
            advice = f" It says that the API is at {self._safe(response.headers['location'])}; correct url."
        return Refused(f"{url}: refused with {status}: {words.rstrip('.')}.{advice}")

    def _connect(self) -> httpx.AsyncClient:
        import httpx

        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, 15.0), pool=None),
            limits=httpx.Limits(
                max_connections=self._concurrency, max_keepalive_connections=self._concurrency
            ),
            trust_env=not is_loopback(self.root),  # a proxy cannot reach this machine's own loopback
        )

    def _tell(self, url: str, fault: Again, seconds: float) -> None:
        now = time.monotonic()
        if seconds < WORTH_TELLING or now - self._told_at < WORTH_TELLING:
            return
        self._told_at = now
        logger.warning("%s: %s; trying again in %s", url, fault.what, duration(seconds))

    def _safe(self, text: str) -> str:
        """Some servers repeat the key in their errors."""
        return text.replace(self._key, "[key]") if self._key else text


def require_httpx() -> None:
    """Refuse to go on without the package that does the talking.

    Raises:
        EnvironmentFault: httpx is not installed.
    """
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(
            "servers need the package httpx. Install it with: pip install 'stillhouse[server]'"
        ) from error


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this very machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _used(reply: Any) -> tuple[int, int]:
    """Tokens read and written, as OpenAI's interface or llama.cpp's own tells them; 0 where it does not."""
    if not isinstance(reply, dict):
        return 0, 0
    usage = reply.get("usage") or {}
    read = usage.get("prompt_tokens") or reply.get("tokens_evaluated") or 0
    written = usage.get("completion_tokens") or reply.get("tokens_predicted") or 0
    return int(read), int(written)


def _words(response: httpx.Response) -> str:
    """What the server says about an error, whichever of the usual shapes it has."""
    try:
        found: Any = response.json()
        if isinstance(found, dict):
            found = found.get("error", found)
        if isinstance(found, dict):
            found = found.get("message") or found.get("detail") or found
    except ValueError:
        found = response.text
    return _short(str(found))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."
