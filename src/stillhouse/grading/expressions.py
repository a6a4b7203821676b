"""Compares expressions by math-verify, in a process of its own.

math-verify bounds its time by signals, which only the main thread of a process can take. In a process of its
own it works for every thread of ours, and an expression that takes it down costs one answer, not the run.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading

from stillhouse.errors import EnvironmentFault

MAX_CHARACTERS = 2000
"""Characters at the end of a response that are searched for an expression."""
TIMEOUT = 5
"""Seconds for parsing, and for comparing, one expression; ordinary ones take a tenth of a second."""
PATIENCE = 4 * TIMEOUT
"""Seconds after which the process is killed, should its own limits not hold."""


def equal_expressions(answer: str, reference: str) -> bool:
    r"""Whether two expressions in LaTeX or plain notation are equivalent, by the library math-verify.

    Args:
        answer: a whole response, or an expression; a `\\boxed{...}` in it is preferred.
        reference: the correct expression.

    Raises:
        EnvironmentFault: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise EnvironmentFault(
            "comparing expressions needs the package math-verify: pip install 'stillhouse[eval]'"
        )
    return _comparer(os.getpid()).equal(answer[-MAX_CHARACTERS:], reference)


class ExpressionComparer:
    """The other process, started when it is needed; any thread may ask.

    Example:
        >>> ExpressionComparer().equal("$x + 1$", "1 + x")
        True
    """

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, answer: str, reference: str) -> bool:
        """Whether both are equivalent; False for what cannot be read or takes too long.

        Raises:
            EnvironmentFault: math-verify cannot be imported.
        """
        with self._lock:
            process = self._running()
            timer = threading.Timer(PATIENCE, process.kill)
            timer.start()
            try:
                return json.loads(_asked(process, json.dumps([answer, reference]))) is True
            except (OSError, ValueError):  # the process has ended
                process.kill()
                return False
            finally:
                timer.cancel()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}\n"
                "from stillhouse.grading.expressions import serve\nserve()"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            problem = _asked(self._process, "").strip() or '"it ended"'
            if json.loads(problem) is not None:
                raise EnvironmentFault(f"comparing expressions: math-verify cannot be used ({problem}).")
        return self._process


@functools.cache
def _comparer(pid: int) -> ExpressionComparer:
    """One by process: a forked child has the parent's pipes, but must not share them."""
    return ExpressionComparer()


def _asked(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline()


def serve() -> None:
    """Answer pairs from standard input, one a line, until it ends; an empty line asks whether all is well."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may write among the answers
    try:
        import math_verify
    except Exception as error:  # noqa: BLE001 - told to the other process, whatever it is
        math_verify = None
        problem = f"{type(error).__name__}: {error}"
    logging.disable(logging.CRITICAL)  # it logs everything that it cannot parse
    for line in sys.stdin:
        found: bool | str | None
        if not line.strip():
            found = None if math_verify is not None else problem
        else:
            answer, reference = json.loads(line)
            try:
                expected = math_verify.parse(f"${reference}$", parsing_timeout=TIMEOUT)
                given = math_verify.parse(answer, parsing_timeout=TIMEOUT)
                found = bool(math_verify.verify(expected, given, timeout_seconds=TIMEOUT))
            except Exception:  # noqa: BLE001 - an expression that it cannot compare is not equal
                found = False
        answers.write(f"{json.dumps(found)}\n")
        answers.flush()
