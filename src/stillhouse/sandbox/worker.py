"""The process that holds the program. It decides nothing: it only returns values."""

from __future__ import annotations

import builtins
import os
import sys
from typing import Any

from stillhouse.sandbox.confine import confine
from stillhouse.sandbox.protocol import Channel, ChannelClosed, Handle, decode, encode


class Worker:
    """Executes the program once, then serves requests on its functions and objects."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._namespace: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
        self._objects: list[Any] = []

    def serve(self) -> None:
        """Answer requests until the checker ends."""
        while True:
            try:
                self._channel.send(self._response(self._channel.receive()))
            except ChannelClosed:
                return

    def _response(self, request: Any) -> Any:
        try:
            return {"value": encode(self._execute(**request), self._keep)}
        except RecursionError:
            return {"error": "RecursionError", "message": "too deep"}
        except BaseException as error:  # noqa: BLE001 - the program may raise anything, SystemExit too
            return {"error": type(error).__name__, "message": _message(error)}

    def _execute(self, op: str, payload: Any) -> Any:
        if op == "exec":
            exec(compile(payload, "program.py", "exec"), self._namespace)  # noqa: S102 - its purpose
            return None
        if op == "lookup":
            if payload not in self._namespace:
                raise NameError(f"name {payload!r} is not defined")
            return self._namespace[payload]
        target, *rest = decode(payload, lambda handle: self._objects[handle.number])
        if op == "call":
            args, kwargs = rest
            return target(*args, **kwargs)
        return (getattr if op == "getattr" else setattr)(target, *rest)

    def _keep(self, value: Any) -> Handle:
        self._objects.append(value)
        return Handle(len(self._objects) - 1, callable(value))


def _message(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:  # noqa: BLE001 - __str__ is the program's own
        return ""


def main(folder: str, limits: dict[str, Any], pipes: tuple[int, ...]) -> None:
    """Confine this process, then serve: requests come from standard input, responses go to the pipe."""
    channel = Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(pipes[0], "wb"))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    confine(folder, **limits)
    sys.set_int_max_str_digits(0)
    Worker(channel).serve()
