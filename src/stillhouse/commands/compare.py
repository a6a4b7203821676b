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
    form: Annotated[
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
    from stillhouse.report import load_runs
    from stillhouse.report.comparison import comparison_tables, comparison_text

    found = load_runs(runs)
    if form == "table" and output is None:
        _show(found, everything)
        return
    if form == "csv":  # which has no place for it
        for table in comparison_tables(found):
            if table.note:
                console.note(f"{table.title}: {table.note}")
    text = comparison_text(found, "markdown" if form == "table" else form, everything=everything)
    if output is None:
        typer.echo(text, nl=False)
        return
    with atomic(output) as handle:
        handle.write(text)
    console.note(f"Wrote {output}")


def _show(runs: Sequence[RunRecord], everything: bool) -> None:
    from stillhouse.report import print_comparison
    from stillhouse.report.configuration import config_diff

    print_comparison(runs, everything=everything)
    differences = config_diff(runs)
    if differences:
        shown = [(row.path, *row.values) for row in differences[:MOST_DIFFERENCES]]
        left = len(differences) - len(shown)
        note = f"{left} more on the page of `stillhouse report`" if left else ""
        names = [run.name for run in runs]
        console.print_table(["setting", *names], shown, title="Settings that differ", note=note)
