"""What worker and checker send each other: one JSON message a line, with a tag for each type that JSON lacks.

Only builtin types are sent. A subclass is sent as the builtin that it extends, by that builtin's own methods;
any other object stays in its process and is sent as a handle.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
MAX_ITEMS = 100_000
"""Items that are taken from an iterator."""
MAX_DEPTH = 64
"""Levels of nesting."""


class ChannelClosed(EOFError):
    """The other process has ended, or sent something that is not a message."""


class NotTransferable(TypeError):
    """A value is nested too deeply or too long, or the data received is not an encoded value."""


class Channel:
    """A pair of pipes to the other process, which is not trusted: a malformed message closes the channel."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: Any) -> None:
        """Write one message.

        Raises:
            ChannelClosed: the other process has ended.
        """
        try:
            self._writer.write(json.dumps(message).encode() + b"\n")
            self._writer.flush()
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def receive(self) -> Any:
        """Wait for one message.

        Raises:
            ChannelClosed: the other process has ended, or its line is too long or not JSON.
        """
        line = self._reader.readline(MAX_MESSAGE_BYTES + 1)
        if not line.endswith(b"\n"):
            ended = len(line) <= MAX_MESSAGE_BYTES
            raise ChannelClosed("the other process has ended" if ended else "a message is too long")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ChannelClosed(f"not a message: {error}") from None


@dataclass(frozen=True)
class Handle:
    """An object that stayed in the worker. Equal only to itself, so an overridden `__eq__` is never called.

    Example: `Handle(3, callable=True)`
    """

    number: int
    callable: bool


def encode(value: Any, keep: Callable[[Any], Handle], depth: int = 0) -> Any:
    """Turn a value into JSON-serialisable data.

    Args:
        value: what to encode.
        keep: called with every object that is not of a builtin type; returns its handle.
        depth: level of nesting so far.

    Raises:
        NotTransferable: the value is nested too deeply, or an iterator has too many items.
    """
    if depth > MAX_DEPTH:
        raise NotTransferable(f"nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, _SCALARS):
        return _scalar(value)

    def encode_all(items: Any) -> list[Any]:
        return [encode(item, keep, depth + 1) for item in items]

    for tag, builtin in _COLLECTIONS.items():
        if isinstance(value, builtin):
            return [tag, encode_all(builtin.__iter__(value))]
    if isinstance(value, dict):
        return ["dict", [encode_all(pair) for pair in dict.items(value)]]
    if isinstance(value, Iterator):
        items = list(itertools.islice(value, MAX_ITEMS + 1))
        if len(items) > MAX_ITEMS:
            raise NotTransferable(f"an iterator of more than {MAX_ITEMS} items")
        return ["iterator", encode_all(items)]
    handle = value if isinstance(value, Handle) else keep(value)
    return ["handle", handle.number, handle.callable]


_SCALARS = (bool, int, float, str, complex, bytes, bytearray)
_COLLECTIONS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def _scalar(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, int):
        return int.__index__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    return ["bytes", bytes(value).hex()]


def decode(data: Any, resolve: Callable[[Handle], Any], depth: int = 0) -> Any:
    """The value that `encode` was given.

    Args:
        data: what `encode` returned.
        resolve: turns a handle into the object that represents it in this process.
        depth: level of nesting so far.

    Raises:
        NotTransferable: the data is not what `encode` returns.
    """
    if not isinstance(data, list):
        if data is None or isinstance(data, bool | int | float | str):
            return data
        raise NotTransferable("not a value")
    if depth > MAX_DEPTH:
        raise NotTransferable(f"nested deeper than {MAX_DEPTH}")
    try:
        tag, *rest = data
        if tag == "handle":
            return resolve(Handle(int(rest[0]), bool(rest[1])))
        if tag == "complex":
            return complex(rest[0], rest[1])
        if tag == "bytes":
            return bytes.fromhex(rest[0])
        if tag == "dict":
            return {
                decode(key, resolve, depth + 1): decode(value, resolve, depth + 1) for key, value in rest[0]
            }
        items = [decode(item, resolve, depth + 1) for item in rest[0]]
        return iter(items) if tag == "iterator" else _COLLECTIONS[tag](items)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise NotTransferable(f"not a value: {error}") from None
