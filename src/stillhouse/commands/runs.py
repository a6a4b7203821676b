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
    from stillhouse.report.chains import chain_line
    from stillhouse.report.listing import list_runs, runs_table
    from stillhouse.report.record import CHAIN_FILE

    lines = list_runs(folders or [Path("runs")])
    if as_json:
        typer.echo(console.json_text([line.as_json() for line in lines], indent=2))
        return
    runs_table(lines).print()
    for line in lines:
        if line.message and line.state in ("failed", "interrupted", "running"):
            console.note(f"{line.folder}: {line.message.splitlines()[0]}")
    parents = dict.fromkeys(Path(line.folder).parent for line in lines)
    for folder in (one for one in parents if (one / CHAIN_FILE).is_file()):
        console.note(chain_line(folder))
