"""stillhouse run: distil as configured in a YAML file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console, signals
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile


@app.command("run", rich_help_panel=RUN)
def run(
    file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest complete checkpoint in the run folder.")
    ] = False,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A new run whose student starts as the one that this finished run has trained.",
            metavar="RUN",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Distil as configured in a YAML file; leaves a run folder with the student, metrics and report.html.

    Ctrl-C, or a scheduler's SIGTERM, finishes the step, saves a checkpoint and stops; continue with --resume.
    """
    from stillhouse.runs.resolve import resolve

    resolved = resolve(file, list(overrides or ()), start_from=start_from)
    from stillhouse.report import load_runs, print_comparison
    from stillhouse.runs.execute import execute
    from stillhouse.runs.folder import default_folder

    stopped: KeyboardInterrupt | None = None
    try:
        result = execute(resolved, resume=resume)
        stopped = signals.Stopped(result.signal) if result.signal is not None else None
    except KeyboardInterrupt as error:
        stopped = error
    if stopped is not None:
        started = (default_folder(resolved.config) / "state.json").exists()
        parent = ["--from", str(start_from)] if start_from is not None else []
        more = [*(overrides or ()), *parent, *(["--resume"] if started else [])]
        command = shlex.join(["stillhouse", "run", str(file), *more])
        console.note(f"Interrupted by {signals.name_of(stopped)}. Continue with: {command}")
        raise typer.Exit(signals.exit_code_of(stopped))
    print_comparison(load_runs([result.folder]))
    console.say(f"Student: {result.folder / 'student'}")
