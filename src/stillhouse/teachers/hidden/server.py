"""A small HTTP server of a teacher's hidden states; see `hidden_protocol` for what it answers."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import nn

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import TeacherError
from stillhouse.teachers.hidden.protocol import (
    DTYPE,
    FINGERPRINT,
    BadBody,
    ServedFacts,
    pack_tensors,
    unpack_request,
)
from stillhouse.teachers.live import LiveTeacher
from stillhouse.teachers.store.codecs import DTYPES, HiddenCodec

logger = logging.getLogger("stillhouse")

MAX_BODY = 64 << 20
"""Bytes of a request; 16 million token ids."""
SENT_AS = (*DTYPES, "int8")

Handler = Callable[[Request], Awaitable[Response]]


class HiddenServer:
    """The routes over one teacher. Requests wait for each other: the model runs on one at a time."""

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
        self._turn = asyncio.Lock()
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
            response = await handler(request)
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
        return _binary(packed)

    async def _hidden(self, request: Request) -> Response:
        dtype = request.headers.get(DTYPE, "")
        if dtype not in SENT_AS:
            raise HTTPException(400, f"{DTYPE} is {dtype!r}; allowed: {', '.join(SENT_AS)}")
        try:
            batch = unpack_request(await _body(request), self._facts.rows, self._facts.context)
        except BadBody as error:
            raise HTTPException(400, str(error)) from None
        async with self._turn:
            try:
                packed = await asyncio.to_thread(self._computed, batch, HiddenCodec(dtype))
            except torch.OutOfMemoryError as error:
                logger.warning("out of memory with %d tokens: lower batch_tokens", batch.num_tokens)
                raise HTTPException(507, "the teacher is out of memory: lower its batch_tokens") from error
            except TeacherError as error:
                raise HTTPException(400, str(error)) from None
        self.sequences += len(batch)
        return _binary(packed)

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


async def _body(request: Request) -> bytes:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY:
            raise HTTPException(413, f"a request is at most {MAX_BODY >> 20} MiB")
    return bytes(content)


def _binary(content: bytes) -> Response:
    return Response(content, media_type="application/octet-stream")


async def _as_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)
