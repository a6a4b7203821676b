"""The process that holds the tests. It is confined too: tests are code from a data file."""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
from collections import Counter
from typing import Any

from stillhouse.sandbox.confine import confine
from stillhouse.sandbox.protocol import Channel, ChannelClosed, Handle, decode, encode


class RemoteObject:
    """A function, class or object of the program. Operations on it run in the worker; data comes back."""

    def __init__(self, program: RemoteProgram, handle: Handle) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.operate("call", self._handle, list(args), dict(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.operate("getattr", self._handle, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.operate("setattr", self._handle, name, value)


class RemoteProgram:
    """The program in the worker, as the checker sees it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def exec(self, source: str) -> None:
        """Execute the program's source."""
        self._request("exec", source)

    def lookup(self, name: str) -> Any:
        """The program's global `name`; NameError if there is none."""
        return self._request("lookup", name)

    def operate(self, op: str, *operands: Any) -> Any:
        """Apply "call", "getattr" or "setattr" to an object of the program."""
        return self._request(op, encode(operands, _handle_of))

    def _request(self, op: str, payload: Any) -> Any:
        self._channel.send({"op": op, "payload": payload})
        response = self._channel.receive()
        if not isinstance(response, dict):
            raise ChannelClosed("not a response")
        if "error" in response:
            raise _exception(str(response["error"]), str(response.get("message", "")))
        return decode(response.get("value"), lambda handle: RemoteObject(self, handle))


def _handle_of(value: Any) -> Handle:
    if isinstance(value, RemoteObject):
        handle: Handle = object.__getattribute__(value, "_handle")
        return handle
    raise TypeError(f"a test passes a {type(value).__name__} to the program, which cannot be sent to it")


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not StopIteration:
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and others take more arguments
            pass
    return RuntimeError(f"{name}: {message}")


def free_names(source: str) -> set[str]:
    """Names that the tests read and neither define nor find among the builtins."""
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


def standard_modules(tests: str, names: set[str]) -> set[str]:
    """Those names that the tests use as modules of the standard library, such as `math` in `math.isclose`."""
    read = [node for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)]
    attributes = [node.value for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Attribute)]
    dotted = Counter(node.id for node in attributes if isinstance(node, ast.Name))
    used = Counter(node.id for node in read)
    return {name for name in names & sys.stdlib_module_names if used[name] == dotted[name]}


def run_tests(
    program: RemoteProgram,
    source: str,
    tests: str,
    entry_point: str | None,
    overrides: list[str],
    helpers: str = "",
) -> dict[str, Any]:
    """Execute the program, then the tests against it.

    Args:
        program: the worker's side.
        source: the program.
        tests: the tests' source.
        entry_point: the function that `check` of the tests is called with; None: tests run as they are.
        overrides: see `ProgramTests.overrides`.
        helpers: see `ProgramTests.helpers`.

    Returns:
        {"passed": bool, "stage": "program" or "tests", "error": what was raised}.
    """
    stage = "program"
    try:
        program.exec(source)
        stage = "tests"
        names: dict[str, Any] = {"__name__": "tests"}
        exec(compile(helpers, "helpers.py", "exec"), names)  # noqa: S102 - from the data, as the tests
        if entry_point is not None:
            tests = f"{tests}\n\ncheck(candidate)\n"
            names["candidate"] = program.lookup(entry_point)
        missing = (free_names(tests) | {*overrides}) - names.keys()
        modules = standard_modules(tests, missing - {entry_point, *overrides})
        names |= {name: importlib.import_module(name) for name in modules}
        for name in sorted(missing - modules):
            names[name] = program.lookup(name)
        exec(compile(tests, "tests.py", "exec"), names)  # noqa: S102 - the purpose of this process
    except ChannelClosed as error:
        return {"passed": False, "stage": stage, "error": f"the program's process ended: {error}"}
    except BaseException as error:  # noqa: BLE001 - whatever a test raises, it has not passed
        message = f"{type(error).__name__}: {str(error)[:300]}".removesuffix(": ")
        return {"passed": False, "stage": stage, "error": message}
    return {"passed": True, "stage": "tests", "error": ""}


def main(folder: str, limits: dict[str, Any], pipes: tuple[int, ...]) -> None:
    """Confine this process, read the job from standard input, write the outcome to the third pipe.

    The first pipe leads to the worker, the second comes from it.
    """
    job = json.loads(sys.stdin.buffer.read())
    channel = Channel(os.fdopen(pipes[1], "rb"), os.fdopen(pipes[0], "wb"))
    outcome_pipe = os.fdopen(pipes[2], "wb")
    confine(folder, **limits)
    sys.set_int_max_str_digits(0)
    outcome = run_tests(RemoteProgram(channel), **job)
    outcome_pipe.write(json.dumps(outcome).encode())
    outcome_pipe.flush()
    os._exit(0)
