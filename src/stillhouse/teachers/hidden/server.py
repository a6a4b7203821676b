"""A small HTTP server of a teacher's hidden states; see `protocol.py` for what it answers."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from collections.abc import Awaitable, Callable

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from torch import nn

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import TeacherError
from stillhouse.teachers.hidden.protocol import (
    CLIENT,
    DTYPE,
    FINGERPRINT,
    BadBody,
    ServedFacts,
    pack_tensors,
    unpack_request,
)
from stillhouse.teachers.hidden.turns import Room, Turns
from stillhouse.teachers.live import LiveTeacher
from stillhouse.teachers.store.codecs import DTYPES, HiddenCodec

logger = logging.getLogger("stillhouse")

MAX_BODY = 16 << 20
"""Bytes of a request; 4 million token ids."""
MAX_WAITING = 256 << 20
"""Bytes of all requests that are received or wait."""
MAX_SENDING = 4 << 30
"""Bytes of all answers that are computed or sent."""
BODY_SECONDS = 60.0
"""Within which a request has to arrive."""
PIECE, PIECE_SECONDS = 1 << 20, 60.0
"""Bytes of an answer that a client has to take, and within which time."""
SENT_AS = (*DTYPES, "int8")

Handler = Callable[[Request], Awaitable[Response]]


class HiddenServer:
    """The routes over one teacher. The model runs on one request at a time, and each client has its turn.

    What is held is bounded: beyond `MAX_WAITING` a request is told to come again (503, Retry-After), and
    nothing is computed before there is room for its answer. Who has gone meanwhile is not computed for, and
    who sends or takes too slowly is cut off.
    """

    def __init__(self, model: nn.Module, facts: ServedFacts, key: str, batch_tokens: int) -> None:
        """Around a loaded teacher.

        Args:
            model: a causal language model.
            facts: what clients are told.
            key: every request has to bring it.
            batch_tokens: most tokens, padding included, of a forward pass; a longer sequence goes alone.
        """
        self._teacher = LiveTeacher(model, facts.rows)
        self._facts = facts
        self._key = key
        self._batch_tokens = batch_tokens
        self._device = self._teacher.head.weight.device
        self._turns = Turns()
        self._requests, self._answers = Room(MAX_WAITING), Room(MAX_SENDING)
        self.sequences = 0
        """Sequences that were answered."""

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/v1/teacher", self._checked(self._describe), methods=["GET"]),
            Route("/v1/head", self._checked(self._head), methods=["GET"]),
            Route("/v1/hidden", self._checked(self._hidden), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _as_json})

    def _checked(self, handler: Handler) -> Handler:
        """Refuse whoever has no key, and whoever means another teacher."""

        async def answer(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
                raise HTTPException(401, "the key is missing or wrong")
            meant = request.headers.get(FINGERPRINT)
            if meant is not None and meant != self._facts.fingerprint:
                raise HTTPException(409, f"this is teacher {self._facts.fingerprint}, not {meant}")
            try:
                response = await handler(request)
            except asyncio.CancelledError:
                raise HTTPException(503, "the server ends", headers={"Retry-After": "1"}) from None
            response.headers[FINGERPRINT] = self._facts.fingerprint
            return response

        return answer

    async def _describe(self, request: Request) -> Response:
        return JSONResponse(self._facts.as_json())

    async def _head(self, request: Request) -> Response:
        head = self._teacher.head
        tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
        packed = await asyncio.to_thread(
            lambda: pack_tensors({name: one.detach().cpu() for name, one in tensors.items()})
        )
        return _Tensors(packed, self._answers)

    async def _hidden(self, request: Request) -> Response:
        dtype = request.headers.get(DTYPE, "")
        if dtype not in SENT_AS:
            raise HTTPException(400, f"{DTYPE} is {dtype!r}; allowed: {', '.join(SENT_AS)}")
        body = bytearray()
        try:
            await self._receive(request, body)
            async with self._turns.of(
                request.headers.get(CLIENT) or str(request.client and request.client.host)
            ):
                if await request.is_disconnected():
                    raise HTTPException(408, "the client has gone")
                return await self._answer(bytes(body), HiddenCodec(dtype))
        finally:
            self._requests.take(-len(body))

    async def _receive(self, request: Request, body: bytearray) -> None:
        """Add what a client sends to `body`, as long as there is room for it."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > MAX_BODY:
                        raise HTTPException(413, f"a request is at most {MAX_BODY >> 20} MiB")
                    if not self._requests.has(len(chunk)):
                        raise HTTPException(503, "too many requests wait", headers={"Retry-After": "1"})
                    body += chunk
                    self._requests.take(len(chunk))
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {BODY_SECONDS:g} s") from None
        except ClientDisconnect:
            raise HTTPException(408, "the client has gone") from None

    async def _answer(self, body: bytes, codec: HiddenCodec) -> Response:
        """The states that a request asks for; its turn has come."""
        try:
            batch = await asyncio.to_thread(unpack_request, body, self._facts.rows, self._facts.context)
        except BadBody as error:
            raise HTTPException(400, str(error)) from None
        size = math.ceil(batch.num_rows * codec.row_bytes(self._facts.width))
        if size > MAX_SENDING:
            raise HTTPException(
                413, f"its answer would have {size:,} bytes, and an answer has at most {MAX_SENDING:,}"
            )
        await self._answers.wait_for(size)
        try:
            packed = await asyncio.to_thread(self._computed, batch, codec)
        except torch.OutOfMemoryError as error:
            logger.warning("out of memory with %d tokens: lower batch_tokens", batch.num_tokens)
            raise HTTPException(507, "the teacher is out of memory: lower its batch_tokens") from error
        except TeacherError as error:
            raise HTTPException(400, str(error)) from None
        self.sequences += len(batch)
        return _Tensors(packed, self._answers)

    def _computed(self, batch: TokenBatch, codec: HiddenCodec) -> bytes:
        """The states of all rows, in the order of the sequences."""
        parts: dict[int, torch.Tensor] = {}
        for rows in _passes(batch, self._batch_tokens):
            part = batch.select(rows).to(self._device)
            states = self._teacher.hidden(part).cpu().split(list(part.row_counts))
            parts |= dict(zip(rows, states, strict=True))
        return pack_tensors(codec.encode(torch.cat([parts[row] for row in range(len(batch))])))


def _passes(batch: TokenBatch, limit: int) -> list[list[int]]:
    """The sequences of each forward pass: neighbours in length, at most `limit` tokens with padding."""
    by_length = sorted(range(len(batch)), key=lambda row: len(batch.token_ids[row]))
    found: list[list[int]] = []
    for row in by_length:
        if found and (len(found[-1]) + 1) * len(batch.token_ids[row]) <= limit:
            found[-1].append(row)
        else:
            found.append([row])
    return found


class _Tensors(Response):
    """A body of tensors, sent in pieces; a client that does not take them is cut off."""

    media_type = "application/octet-stream"

    def __init__(self, content: bytes, room: Room) -> None:
        super().__init__(content)
        self._room = room
        room.take(len(content))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content, end = memoryview(self.body), len(self.body)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            for start in range(0, end, PIECE):
                async with asyncio.timeout(PIECE_SECONDS):
                    piece = bytes(content[start : start + PIECE])
                    more = start + PIECE < end
                    await send({"type": "http.response.body", "body": piece, "more_body": more})
        except TimeoutError:
            logger.warning(
                "a client took no more than %d of %d bytes of its answer, and is cut off", start, end
            )
        finally:
            self._room.take(-end)


async def _as_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
