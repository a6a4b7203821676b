"""What of an HTTP response is taken and read: a bounded body, the count of its tokens, messages of errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from stillhouse.errors import RequestRejected, ServerError
from stillhouse.remote.answers import InvalidAnswer

RequestBody = Mapping[str, Any]
MAX_ERROR_BYTES = 1 << 16
"""Of the body of a refusal."""

ENCODINGS = ("gzip", "deflate", "identity")
"""How a body may be packed: both expand at most a thousandfold, and a chunk at a time."""


async def received(response: httpx.Response, limit: int) -> httpx.Response:
    """A response with its body, of which no more is taken than an answer to the request can have.

    Raises:
        ServerError: it is larger, packed in a way that was not offered, or says that it is no JSON.
    """
    headers = response.headers
    url, whole = response.url, response.status_code == 200
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if whole and kind and not ("json" in kind or kind in ("text/plain", "application/octet-stream")):
        raise RequestRejected(
            f"{url}: answers with {shorten(kind)}, not with JSON. Look at url: it should lead to the API "
            "(http://HOST:PORT/v1), not to a web page."
        )
    if headers.get("content-encoding", "identity").strip().lower() not in ENCODINGS:
        raise ServerError(f"{url}: packs its answer as {shorten(headers['content-encoding'])}, unasked.")
    limit = limit if whole else MAX_ERROR_BYTES
    too_large = ServerError(
        f"{url}: sent more than {limit >> 20} MiB, which no answer to what was asked can have. The rest was "
        "not read, and nothing of it is kept."
    )
    declared = headers.get("content-length", "")
    if whole and declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > limit:
            if whole:
                raise too_large
            break
    kept = {name: value for name, value in headers.items() if name != "content-encoding"}
    return httpx.Response(
        response.status_code, headers=kept, content=bytes(content), extensions=response.extensions
    )


def not_an_answer_message(url: str, body: RequestBody | None, error: InvalidAnswer) -> str:
    """The message for an answer that is not one to what was asked: server, request and field."""
    prompt = (body or {}).get("prompt")
    asked = "a request"
    if isinstance(prompt, list):
        first = " ".join(map(str, prompt[:6])) + (" ..." if len(prompt) > 6 else "")
        asked = f"the request with a prompt of {len(prompt)} tokens ({first})"
    elif isinstance(prompt, str):
        asked = f"the request with the prompt {shorten(prompt)[:60]!r}"
    limit = (body or {}).get("max_tokens")
    asked += "" if limit is None else f" and max_tokens {limit}"
    return (
        f"{url}: its answer to {asked} is not one: {error}. Nothing of it is kept. Look whether the server "
        "serves the model that is meant, and whether something stands between; then go on with --resume."
    )


def token_usage(reply: Any) -> tuple[int, int]:
    """Tokens of prompt and completion, as OpenAI's API or llama.cpp's own reports them; 0 where neither, or
    where what is said is no number of tokens: they are only counted."""
    if not isinstance(reply, dict):
        return 0, 0
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt = usage.get("prompt_tokens") or reply.get("tokens_evaluated")
    completion = usage.get("completion_tokens") or reply.get("tokens_predicted")
    return _count_of(prompt), _count_of(completion)


def _count_of(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 53 else 0


def error_message(response: httpx.Response) -> str:
    """The server's own message, whichever of the usual shapes it has."""
    try:
        found: Any = response.json()
        if isinstance(found, dict):
            found = found.get("error", found)
        if isinstance(found, dict):
            found = found.get("message") or found.get("detail") or found
    except ValueError:
        found = response.text
    return shorten(str(found))


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."
