"""Consoles that write into memory, and a clock that a test moves."""

from __future__ import annotations

import io
import re

import pyte
from rich.console import Console


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pipe(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def terminal(width: int = 120) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, highlight=False, _environ={"TERM": "xterm"}
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def printed(console: Console) -> str:
    """What was written, without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(console))


def screen(console: Console) -> list[str]:
    """What a terminal shows after everything that was written, line by line."""
    shown = pyte.Screen(console.width, 40)
    shown.set_mode(pyte.modes.LNM)  # a line feed also returns, as a terminal driver has it
    pyte.Stream(shown).feed(written(console))
    return [line.rstrip() for line in shown.display if line.strip()]
