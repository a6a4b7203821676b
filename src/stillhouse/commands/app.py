"""The `stillhouse` application: panels of its help, the global options, and errors as exit codes."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer
import typer.core

from stillhouse import __version__, console, signals
from stillhouse.errors import EnvironmentFault, StillhouseError

START, RUN, RESPONSES, RESULTS = PANELS = ("Start", "Run", "Responses", "Results")
"""The panels of `stillhouse --help`, from the first thing a user does to the last."""


class _InPanelOrder(typer.core.TyperGroup):
    """Lists commands by panel, alphabetically within one, in whatever order their files were imported."""

    def list_commands(self, ctx: object) -> list[str]:
        panels = {name: getattr(command, "rich_help_panel", "") for name, command in self.commands.items()}
        return sorted(panels, key=lambda name: (PANELS.index(panels[name]), name))


app = typer.Typer(
    name="stillhouse",
    cls=_InPanelOrder,
    help="Distil large language models into small ones.\n\n"
    "Start with [bold]stillhouse quickstart[/bold], or [bold]stillhouse init kd -o run.yaml[/bold], edit it, "
    "then [bold]stillhouse check run.yaml[/bold] and [bold]stillhouse run run.yaml[/bold].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.output().print(f"stillhouse {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


TOLD = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO,
        errno.EMFILE, errno.ENFILE, errno.ENOTDIR, errno.EISDIR, errno.ESTALE,
    }
)  # fmt: skip
"""Errors of the operating system whose words say enough; others are ours, and show where."""


def main() -> None:
    """Run the command line. Deliberate errors become one message and an exit code, never a traceback.

    Exit codes: 0 success, 2 the input must be corrected, 3 the environment failed, 130 interrupted by Ctrl-C,
    143 by SIGTERM.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console.quieten_imports()
    console.print_log_records()
    try:
        with signals.handled(signals.stop):
            app()
    except StillhouseError as error:
        console.show_error(error)
        sys.exit(error.exit_code)
    except SystemExit as error:
        stopped = getattr(
            error.__context__, "__cause__", None
        )  # typer turns every interruption into exit code 130, without a word
        if not isinstance(stopped, KeyboardInterrupt):
            raise
        console.note(f"Interrupted by {signals.name_of(stopped)}.")
        sys.exit(signals.exit_code_of(stopped))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.errno not in TOLD:
            raise
        fault = EnvironmentFault(
            f"{error.filename or 'writing'}: {error.strerror}. Files written earlier are intact."
        )
        console.show_error(fault)
        sys.exit(fault.exit_code)
