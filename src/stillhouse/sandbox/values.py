"""Values as they go between worker and checker: JSON with a tag for what JSON lacks.

Only builtin types cross. A subclass crosses as the builtin that it extends, by that builtin's own methods;
any other object stays where it is and crosses as a number for it (a handle).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

ITEMS = 100_000
"""Most items that are taken from an iterator."""
DEPTH = 64
"""Deepest nesting."""


@dataclass(frozen=True)
class Handle:
    """An object that stayed in the worker. Equal only to itself, so no claim of equality crosses.

    Example: `Handle(3, callable=True)`
    """

    number: int
    callable: bool


class CannotCross(TypeError):
    """A value is nested too deeply, or is too long."""


def encode(value: Any, keep: Callable[[Any], Handle], depth: int = 0) -> Any:
    """Turn a value into JSON-able data; `keep` is given every object that cannot cross.

    Raises:
        CannotCross: it is nested too deeply, or an iterator does not end.
    """
    if depth > DEPTH:
        raise CannotCross(f"nested deeper than {DEPTH}")
    if value is None or isinstance(value, _PLAIN):
        return _plain(value)

    def each(items: Any) -> list[Any]:
        return [encode(item, keep, depth + 1) for item in items]

    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [name, each(kind.__iter__(value))]
    if isinstance(value, dict):
        return ["dict", [each(pair) for pair in dict.items(value)]]
    if isinstance(value, Iterator):
        taken = list(itertools.islice(value, ITEMS + 1))
        if len(taken) > ITEMS:
            raise CannotCross(f"an iterator of more than {ITEMS} items")
        return ["iterator", each(taken)]
    kept = value if isinstance(value, Handle) else keep(value)
    return ["handle", kept.number, kept.callable]


_PLAIN = (bool, int, float, str, complex, bytes, bytearray)


def _plain(value: Any) -> Any:
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


_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def decode(data: Any, resolve: Callable[[Handle], Any], depth: int = 0) -> Any:
    """The value that `encode` was given; `resolve` turns a handle into what stands for it here.

    Raises:
        CannotCross: the data is not what `encode` writes.
    """
    if not isinstance(data, list):
        if data is None or isinstance(data, bool | int | float | str):
            return data
        raise CannotCross("not a value")
    if depth > DEPTH:
        raise CannotCross(f"nested deeper than {DEPTH}")
    try:
        tag, *rest = data
        if tag == "handle":
            return resolve(Handle(int(rest[0]), bool(rest[1])))
        if tag == "complex":
            return complex(rest[0], rest[1])
        if tag == "bytes":
            return bytes.fromhex(rest[0])
        items = [decode(item, resolve, depth + 1) for item in rest[0]] if tag != "dict" else rest[0]
        if tag == "dict":
            return {
                decode(key, resolve, depth + 1): decode(value, resolve, depth + 1) for key, value in items
            }
        return iter(items) if tag == "iterator" else _SEQUENCES[tag](items)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CannotCross(f"not a value: {error}") from None
