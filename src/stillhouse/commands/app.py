"""The `stillhouse` command."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Annotated

import typer

from stillhouse import __version__, console
from stillhouse.commands import (
    align,
    cache,
    check,
    compare,
    curate,
    generate,
    init,
    judge,
    methods,
    quickstart,
    report,
    run,
    runs,
    show,
)
from stillhouse.commands import (
    eval as evaluate,
)
from stillhouse.errors import EnvironmentFault, StillhouseError

app = typer.Typer(
    name="stillhouse",
    help="Distil large language models into small ones.\n\n"
    "Start with [bold]stillhouse quickstart[/bold], or [bold]stillhouse init kd -o run.yaml[/bold], edit it, "
    "then [bold]stillhouse check run.yaml[/bold] and [bold]stillhouse run run.yaml[/bold].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (
    quickstart, init, methods, check, align, run, runs, generate, curate, show, evaluate, judge, compare,
    report, cache,
):  # fmt: skip
    verb.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        console.output().print(f"stillhouse {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Options before the verb."""


class _Shown(logging.Handler):
    """What the package logs, in the words and colours of the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            console.warn(record.getMessage())
        else:
            console.note(record.getMessage())


def main() -> None:
    """Run the command line; deliberate errors become one message and an exit code, never a traceback.

    Exit codes: 0 done, 2 something in the input to mend, 3 the environment failed, 130 interrupted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    log = logging.getLogger("stillhouse")
    log.propagate = False
    log.handlers[:] = [_Shown()]
    try:
        app()
    except StillhouseError as error:
        console.show_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.note("Interrupted.")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        fault = EnvironmentFault(
            f"{error.filename or 'writing'}: {error.strerror}. What was written before is intact."
        )
        console.show_error(fault)
        sys.exit(fault.exit_code)
