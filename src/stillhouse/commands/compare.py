"""stillhouse compare: the results of runs as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stillhouse import console

if TYPE_CHECKING:
    from stillhouse.report import RunRecord

MOST_DIFFERENCES = 30


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("compare")(command)


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, or folders that hold some.", metavar="FOLDER", show_default=False),
    ],
    kind: Annotated[
        Literal["table", "csv", "json", "markdown", "latex"],
        typer.Option(
            "--format", "-f", help="csv and json hold raw values; latex needs the package booktabs."
        ),
    ] = "table",
    everything: Annotated[
        bool, typer.Option("--all", help="Also the measures that the first table leaves out.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write to this file instead of the terminal.", show_default=False
        ),
    ] = None,
) -> None:
    """Compare runs: every system with its measures, the best student marked, and which settings differ."""
    from stillhouse.files import atomic
    from stillhouse.report.formats import compared, comparison_tables, load_runs

    found = load_runs(runs)
    if kind == "table" and output is None:
        _show(found, everything)
        return
    if kind == "csv":  # which has no place for it
        for table in comparison_tables(found):
            if table.unlike:
                console.note(f"{table.task}: {table.unlike_text}")
    text = compared(found, "markdown" if kind == "table" else kind, everything=everything)
    if output is None:
        typer.echo(text, nl=False)
        return
    with atomic(output) as handle:
        handle.write(text)
    console.note(f"Wrote {output}")


def _show(runs: Sequence[RunRecord], everything: bool) -> None:
    from stillhouse.report.sections import config_diff

    show_tables(runs, everything=everything)
    differences = config_diff(runs)
    if differences:
        shown = [(row.path, *row.values) for row in differences[:MOST_DIFFERENCES]]
        left = len(differences) - len(shown)
        caption = f"{left} more on the page of `stillhouse report`" if left else None
        names = [run.name for run in runs]
        console.table(["setting", *names], shown, title="Settings that differ", caption=caption)


def show_tables(runs: Sequence[RunRecord], *, everything: bool = False) -> None:
    """Print one table for each task, the best student bold, and what was not measured alike."""
    from rich.text import Text

    from stillhouse.report.formats import comparison_tables

    tables = comparison_tables(runs, everything=everything)
    if not tables:
        console.note("No system of these runs has been evaluated yet.")
    for table in tables:
        rows = [
            [
                system.label,
                *(
                    Text(f"{cell.text} {cell.spread}".rstrip(), style="bold" if cell.best else "")
                    for cell in cells
                ),
            ]
            for system, cells in table.rows
        ]
        console.table(["system", *(column.label for column in table.columns)], rows, title=table.task or None)
        if table.unlike:
            console.note(table.unlike_text)
