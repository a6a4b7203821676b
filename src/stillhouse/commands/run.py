"""stillhouse run: distil as configured in a YAML file, in one run or a chain of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import console, signals
from stillhouse.commands.app import RUN, Interrupted, app
from stillhouse.commands.options import Overrides, RunFile
from stillhouse.core import other_processes
from stillhouse.core.launcher import start_again
from stillhouse.core.lost_peers import lost_peers_as_faults

if TYPE_CHECKING:
    from stillhouse.runs.result import Result

Redo = Annotated[
    str | None,
    typer.Option(
        help="Of a chain: make this stage anew, and all that follow from it; the others stay.",
        metavar="STAGE",
        show_default=False,
    ),
]
Until = Annotated[
    str | None, typer.Option(help="Of a chain: end after this stage.", metavar="STAGE", show_default=False)
]


StartFrom = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="A new run whose student starts as the one that this finished run has trained.",
        metavar="RUN",
        show_default=False,
    ),
]


@app.command("run", rich_help_panel=RUN)
def run(
    file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the newest complete checkpoint in the run folder; in a chain finished "
            "stages stay as they are.",
        ),
    ] = False,
    start_from: StartFrom = None,
    redo: Redo = None,
    until: Until = None,
) -> None:
    """Distil as configured in a YAML file; leaves a run folder with the student, metrics and report.html.

    A file with stages leaves a run folder for each. Ctrl-C, or a scheduler's SIGTERM, finishes the step,
    saves a checkpoint and stops; continue with --resume.
    """
    from stillhouse.runs.api import refuse_options_of_other
    from stillhouse.runs.chains.resolve import Chain, resolve_chain
    from stillhouse.runs.resolve import is_chain, resolve

    chained = is_chain(file)
    refuse_options_of_other(chained, start_from=start_from, redo=redo, until=until)
    given = list(overrides or ())
    resolved = resolve_chain(file, given) if chained else resolve(file, given, start_from=start_from)
    from stillhouse.runs.chains.execute import run_chain  # with all that trains: after what may be refused
    from stillhouse.runs.execute import execute
    from stillhouse.runs.folder import default_folder

    parent = ["--from", str(start_from)] if start_from is not None else []
    folder = resolved.folder if isinstance(resolved, Chain) else default_folder(resolved.config)
    try:
        with lost_peers_as_faults():
            if isinstance(resolved, Chain):
                result = run_chain(resolved, resume=resume, redo=redo, until=until)
            else:
                result = execute(resolved, resume=resume)
        other_processes.leave()  # all have come to the same end
    except KeyboardInterrupt as error:
        if (fault := other_processes.fault_before_signal()) is not None:
            raise fault from error
        other_processes.leave(f"{other_processes.STOPPED} {signals.name_of(error)}")
        _tell_how_to_go_on(error, file, [*given, *parent], folder)
        raise Interrupted(signals.exit_code_of(error)) from error
    if result.signal is not None:
        stopped = signals.Stopped(result.signal)
        _tell_how_to_go_on(stopped, file, [*given, *parent], folder)
        raise typer.Exit(stopped.exit_code)
    _tell_result(result)


def _tell_result(result: Result) -> None:
    from stillhouse.files import ROWS_FILE
    from stillhouse.report import load_runs, print_comparison

    print_comparison(load_runs([result.folder]))
    last = list(result.stages.values())[-1].folder if result.stages else result.folder
    rows = last / ROWS_FILE
    console.say(f"Rows: {rows}" if rows.is_file() else f"Student: {last / 'student'}")


def _tell_how_to_go_on(stopped: KeyboardInterrupt, file: Path, options: Sequence[str], folder: Path) -> None:
    started = any((folder / name).exists() for name in ("state.json", "chain.json"))
    command = start_again(["run", str(file), *options, *(["--resume"] if started else [])])
    console.note(f"Interrupted by {signals.name_of(stopped)}. Continue with: {command}")
