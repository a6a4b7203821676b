"""stillhouse run: distil as configured in a YAML file."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile


@app.command("run", rich_help_panel=RUN)
def run(
    file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest complete checkpoint in the run folder.")
    ] = False,
) -> None:
    """Distil as configured in a YAML file; leaves a run folder with the student, metrics and report.html.

    Ctrl-C finishes the step, saves a checkpoint and stops; continue later with --resume.
    """
    from stillhouse.runs.resolve import resolve

    resolved = resolve(file, list(overrides or ()))
    from stillhouse.report import load_runs, print_comparison
    from stillhouse.runs.execute import execute
    from stillhouse.runs.folder import default_folder

    try:
        result = execute(resolved, resume=resume)
    except KeyboardInterrupt:
        result = None
    if result is None or result.state == "interrupted":
        started = (default_folder(resolved.config) / "state.json").exists()
        command = ["stillhouse", "run", str(file), *(overrides or ()), *(["--resume"] if started else [])]
        console.note(f"Interrupted. Continue with: {shlex.join(command)}")
        raise typer.Exit(130)
    print_comparison(load_runs([result.folder]))
    console.say(f"Student: {result.folder / 'student'}")
