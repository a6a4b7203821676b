"""stillhouse runs: which runs there are and how they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("runs")(command)


def command(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders that hold runs; default: runs.", metavar="FOLDER", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List runs: state (running, interrupted, failed, done), method, steps, best score, age."""
    from stillhouse.report.listing import list_runs, runs_table

    lines = list_runs(folders or [Path("runs")])
    if as_json:
        typer.echo(json.dumps([line.as_json() for line in lines], indent=2))
        return
    runs_table(lines).print()
    for line in lines:
        if line.message and line.state in ("failed", "interrupted", "running"):
            console.note(f"{line.folder}: {line.message.splitlines()[0]}")
