"""The process that holds the model's program. Nothing it says decides anything: it only returns values."""

from __future__ import annotations

import builtins
import os
import sys
from typing import Any

from stillhouse.sandbox.channel import Channel, Closed
from stillhouse.sandbox.confine import confine
from stillhouse.sandbox.values import Handle, decode, encode


class Worker:
    """Executes the program once, then answers calls of its functions."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._names: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
        self._kept: list[Any] = []

    def serve(self) -> None:
        """Answer until the checker goes."""
        while True:
            try:
                self._channel.send(self._answer(self._channel.receive()))
            except Closed:
                return

    def _answer(self, asked: Any) -> Any:
        try:
            return {"value": encode(self._do(**asked), self._keep)}
        except RecursionError:
            return {"error": "RecursionError", "message": "too deep"}
        except BaseException as error:  # noqa: BLE001 - the program may raise anything, SystemExit too
            return {"error": type(error).__name__, "message": _said(error)}

    def _do(self, do: str, what: Any) -> Any:
        if do == "run":
            exec(compile(what, "program.py", "exec"), self._names)  # noqa: S102 - what this process is for
            return None
        if do == "find":
            if what not in self._names:
                raise NameError(f"name {what!r} is not defined")
            return self._names[what]
        target, *rest = decode(what, lambda handle: self._kept[handle.number])
        if do == "call":
            args, kwargs = rest
            return target(*args, **kwargs)
        return (getattr if do == "get" else setattr)(target, *rest)

    def _keep(self, value: Any) -> Handle:
        self._kept.append(value)
        return Handle(len(self._kept) - 1, callable(value))


def _said(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:  # noqa: BLE001 - __str__ is the program's own
        return ""


def main(folder: str, limits: dict[str, Any], pipes: tuple[int, ...]) -> None:
    """Confine this process, then serve. Reads from standard input, writes to the pipe."""
    channel = Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(pipes[0], "wb"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    confine(folder, **limits)
    sys.set_int_max_str_digits(0)
    Worker(channel).serve()
