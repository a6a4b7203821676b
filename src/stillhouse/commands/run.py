"""stillhouse run: distil as a YAML file says."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.arguments import Overrides, RunFile


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("run")(command)


def command(
    file: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint of the run's folder.")
    ] = False,
) -> None:
    """Distil as a YAML file says; leaves a run folder with the student, metrics and report.html.

    Ctrl-C finishes the step, writes a checkpoint and stops; go on later with --resume.
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
        begun = (default_folder(resolved.config) / "state.json").exists()
        again = shlex.join(
            ["stillhouse", "run", str(file), *(overrides or ()), *(["--resume"] if begun else [])]
        )
        console.note(f"Interrupted. Go on with: {again}")
        raise typer.Exit(130)
    print_comparison(load_runs([result.folder]))
    console.say(f"Student: {result.folder / 'student'}")
