"""The `stillhouse` application: panels of its help, the global options, and errors as exit codes."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer
import typer.core

from stillhouse import __version__, console, signals
from stillhouse.core import other_processes
from stillhouse.core.distributed import rank_and_size
from stillhouse.core.other_processes import OtherProcesses
from stillhouse.errors import ConfigError, EnvironmentFault, Fault, StillhouseError

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


class Interrupted(typer.Exit):
    """A signal has ended the command, which has said so itself."""


TOGETHER = frozenset({"run", "eval"})
"""Commands that several processes run together (torchrun, accelerate launch)."""
BY_SHARES = frozenset({"generate", "curate", "cache"})
"""Commands of which each process does a share by itself."""


def _print_version(wanted: bool) -> None:
    if wanted:
        console.output().print(f"stillhouse {__version__}")
        raise typer.Exit


def _join_others(command: str) -> None:
    """Refuse a command that is not made for several processes; else join those that run it together.

    Raises:
        ConfigError: every process would do all of it.
    """
    rank, size = rank_and_size()
    if size == 1 or command in BY_SHARES:
        return
    if command not in TOGETHER:
        if rank != 0:  # the first one says it
            raise typer.Exit(ConfigError.exit_code)
        raise ConfigError(
            Fault(
                f"stillhouse {command}",
                f"runs in one process, and this is one of {size}: each would do all of it",
                got=f"WORLD_SIZE {size}",
                hint="Start it once, without torchrun or accelerate launch, or unset RANK and WORLD_SIZE.",
            )
        )
    OtherProcesses.join()


@app.callback()
def _global_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""
    _join_others(str(context.invoked_subcommand))


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
    143 by SIGTERM. Of several processes one tells what is wrong, and none goes on without another.
    """
    try:
        _run_command()
    except SystemExit as error:
        other_processes.leave(other_processes.DONE if error.code in (0, None) else f"exit code {error.code}")
        if signals.broke_off(error):
            signals.end_soon(int(error.code or 0))
        raise
    except KeyboardInterrupt as again:  # while the first one was being told
        signals.end_soon(signals.exit_code_of(again))
        sys.exit(signals.exit_code_of(again))
    except BaseException as error:
        others = other_processes.current()
        told_by_another = others is not None and not others.tells()
        other_processes.leave(f"{type(error).__name__}: {error}")
        if told_by_another:
            sys.exit(1)
        raise


def _show(error: StillhouseError) -> None:
    """Say what is wrong, unless another process has."""
    others = other_processes.current()
    if others.tells() if others is not None else _speaks(error):
        console.show_error(error)
    other_processes.leave(str(error))


def _speaks(error: StillhouseError) -> bool:
    """Whether this process says what is wrong where it has met no others: not if another of its machine finds
    the same in the same configuration."""
    rank, _ = rank_and_size()
    return rank == 0 or os.environ.get("LOCAL_RANK") == "0" or not isinstance(error, ConfigError)


def _run_command() -> None:
    """The command, and its errors as messages and exit codes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console.quieten_imports()
    console.print_log_records()
    try:
        with signals.handled(signals.stop):
            app()
    except StillhouseError as error:
        _show(error)
        sys.exit(error.exit_code)
    except SystemExit as error:
        ended = error.__context__  # typer turns every interruption into exit code 130, without a word
        stopped = getattr(ended, "__cause__", None)
        if isinstance(ended, Interrupted) or not isinstance(stopped, KeyboardInterrupt):
            raise
        if (fault := other_processes.fault_before_signal()) is not None:
            _show(fault)
            sys.exit(fault.exit_code)
        console.note(f"Interrupted by {signals.name_of(stopped)}.")
        other_processes.leave(f"{other_processes.STOPPED} {signals.name_of(stopped)}")
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
        _show(fault)
        sys.exit(fault.exit_code)
