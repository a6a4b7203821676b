"""stillhouse runs: the runs in a folder and their states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RESULTS, app


@app.command("runs", rich_help_panel=RESULTS)
def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders that contain runs; default: runs.", metavar="FOLDER", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List runs: state (running, interrupted, failed, done), method, steps, best score, age."""
    from stillhouse.report.listing import list_runs, runs_table

    lines = list_runs(folders or [Path("runs")])
    if as_json:
        typer.echo(console.json_text([line.as_json() for line in lines], indent=2))
        return
    runs_table(lines).print()
    for line in lines:
        if line.message and line.state in ("failed", "interrupted", "running"):
            console.note(f"{line.folder}: {line.message.splitlines()[0]}")
