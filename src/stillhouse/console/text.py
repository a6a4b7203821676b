"""Lines of text: results to standard output, notes, warnings and errors to standard error.

Of the processes of one run the first speaks for all; an error is told by whom it meets.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from stillhouse.console.format import visible
from stillhouse.errors import StillhouseError

_live: list[Console] = []
"""The console of a live display, while there is one."""


def output() -> Console:
    """Standard output as rich sees it at this moment."""
    return Console(highlight=False, quiet=not _first())


def messages() -> Console:
    """Standard error as rich sees it at this moment; during a live display its console."""
    return _live[-1] if _live else Console(stderr=True, highlight=False, quiet=not _first())


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def messages_through(console: Console) -> Iterator[None]:
    """Let messages go through the console of a live display, which they would tear otherwise."""
    _live.append(console)
    try:
        yield
    finally:
        _live.remove(console)


def say(text: str) -> None:
    """Print one line of result to standard output, never broken and never read as markup.

    Text for programs, such as JSON, goes through `typer.echo` instead, as it is.
    """
    output().print(Text(visible(text)), soft_wrap=True)


def note(text: str) -> None:
    """Print one line about what goes on to standard error."""
    messages().print(Text(visible(text)), soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    messages().print(Text.assemble(("warning: ", "bold yellow"), visible(text)), soft_wrap=True)


def show_error(error: StillhouseError) -> int:
    """Print the message of a deliberate error to standard error, without a traceback.

    Of several processes each tells its own with its number; what is wrong in the configuration, which all of
    them read, once on a machine.

    Returns:
        The exit code: 2 where the user can mend the input, 3 where the environment failed.
    """
    text = visible(str(error))
    gap = "\n" if "\n" in text else " "
    if _first():
        messages().print(Text.assemble(("error:", "bold red"), gap, text), soft_wrap=True)
    else:
        label = f"error in process {os.environ['RANK']}:"
        Console(stderr=True, highlight=False).print(
            Text.assemble((label, "bold red"), gap, text), soft_wrap=True
        )
    return error.exit_code


class _ConsoleHandler(logging.Handler):
    """Prints the package's log records as the console prints notes and warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            warn(record.getMessage())
        else:
            note(record.getMessage())


def print_log_records() -> None:
    """Print the package's log records to standard error; without this they go where Python's logging says."""
    log = logging.getLogger("stillhouse")
    log.propagate = False
    log.handlers[:] = [_ConsoleHandler()]


@contextlib.contextmanager
def filtered_records(keep: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Within the block the package's log records are printed only if `keep` says so, which may change them.

    A filter of a logger sees nothing of the loggers below it, so this is one of the handlers.
    """
    package = logging.getLogger("stillhouse")

    def of_the_package(record: logging.LogRecord) -> bool:
        return record.name.partition(".")[0] != package.name or keep(record)

    handlers = [*package.handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(of_the_package)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(of_the_package)


def each_text_once() -> Callable[[logging.LogRecord], bool]:
    """For `filtered_records`: keeps the first record of each text, in every handler that sees it."""
    first: dict[str, logging.LogRecord] = {}
    return lambda record: first.setdefault(record.getMessage(), record) is record


CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers that warn, on import, of GPU libraries that a machine does not have and nobody has asked for."""


def quieten_imports() -> None:
    """Let libraries be imported without a word on what else they could use."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
