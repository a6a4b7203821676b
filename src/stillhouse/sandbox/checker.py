"""The process that holds the tests. It is confined too, for tests are programs of somebody's data file."""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
from typing import Any

from stillhouse.sandbox.channel import Channel, Closed
from stillhouse.sandbox.confine import confine
from stillhouse.sandbox.values import Handle, decode, encode


class Remote:
    """A function, class or object of the program. What is done to it happens there; data comes back."""

    def __init__(self, program: Program, handle: Handle) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.ask("call", self._handle, list(args), dict(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("get", self._handle, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("set", self._handle, name, value)


class Program:
    """The worker, as the checker sees it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def run(self, text: str) -> None:
        """Execute the program's text."""
        self._exchange("run", text)

    def find(self, name: str) -> Any:
        """What the program calls `name`; NameError if it has no such name."""
        return self._exchange("find", name)

    def ask(self, do: str, *what: Any) -> Any:
        """Do something ("call", "get", "set") with an object of the program."""
        return self._exchange(do, encode(what, _stays))

    def _exchange(self, do: str, what: Any) -> Any:
        self._channel.send({"do": do, "what": what})
        answer = self._channel.receive()
        if not isinstance(answer, dict):
            raise Closed("not an answer")
        if "error" in answer:
            raise _exception(str(answer["error"]), str(answer.get("message", "")))
        return decode(answer.get("value"), lambda handle: Remote(self, handle))


def _stays(value: Any) -> Handle:
    if isinstance(value, Remote):
        handle: Handle = object.__getattribute__(value, "_handle")
        return handle
    raise TypeError(f"a test gives the program a {type(value).__name__}, which cannot be sent to it")


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not StopIteration:
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and others that want more
            pass
    return RuntimeError(f"{name}: {message}")


def free_names(source: str) -> set[str]:
    """Names that a text of tests reads and neither defines nor finds among the builtins."""
    read: set[str] = set()
    bound: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
    return read - bound - set(dir(builtins))


def judge(
    program: Program, text: str, tests: str, entry_point: str | None, provides: list[str]
) -> dict[str, Any]:
    """Run the program, then the tests against it.

    Returns:
        {"passed": bool, "stage": "program" or "tests", "reason": what was raised}.
    """
    stage = "program"
    try:
        program.run(text)
        stage = "tests"
        names: dict[str, Any] = {"__name__": "tests"}
        source = tests if entry_point is None else f"{tests}\n\ncheck(candidate)\n"
        if entry_point is not None:
            names["candidate"] = program.find(entry_point)
        for name in sorted((free_names(source) | {*provides}) - names.keys()):
            names[name] = program.find(name)
        exec(compile(source, "tests.py", "exec"), names)  # noqa: S102 - what this process is for
    except Closed as error:
        return {"passed": False, "stage": stage, "reason": f"the program's process ended: {error}"}
    except BaseException as error:  # noqa: BLE001 - whatever a test raises, it has not passed
        said = f"{type(error).__name__}: {str(error)[:300]}".removesuffix(": ")
        return {"passed": False, "stage": stage, "reason": said}
    return {"passed": True, "stage": "tests", "reason": ""}


def main(folder: str, limits: dict[str, Any], pipes: tuple[int, ...]) -> None:
    """Confine this process, read the task from standard input, write the verdict to the third pipe.

    The first pipe leads to the worker, the second comes from it.
    """
    task = json.loads(sys.stdin.buffer.read())
    channel = Channel(os.fdopen(pipes[1], "rb"), os.fdopen(pipes[0], "wb"))
    verdict = os.fdopen(pipes[2], "wb")
    confine(folder, **limits)
    sys.set_int_max_str_digits(0)
    found = judge(Program(channel), **task)
    verdict.write(json.dumps(found).encode())
    verdict.flush()
    os._exit(0)
