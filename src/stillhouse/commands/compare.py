"""stillhouse compare: the results of runs as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stillhouse import console
from stillhouse.commands.app import RESULTS, app
from stillhouse.commands.options import RunFolders

if TYPE_CHECKING:
    from stillhouse.report import RunRecord

MAX_DIFFERENCES = 30
"""Rows of the table of settings that differ."""


@app.command("compare", rich_help_panel=RESULTS)
def compare(
    runs: RunFolders,
    form: Annotated[
        Literal["table", "csv", "json", "markdown", "latex"],
        typer.Option(
            "--format", "-f", help="csv and json have raw values; latex needs the package booktabs."
        ),
    ] = "table",
    all_measures: Annotated[
        bool, typer.Option("--all", help="Include the measures that the first table leaves out.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write to this file, not to the terminal.", show_default=False),
    ] = None,
) -> None:
    """Compare runs: every system with its measures, the best student marked, and the settings that differ."""
    from stillhouse.files import atomic
    from stillhouse.report import load_runs, print_comparison
    from stillhouse.report.comparison import comparison_tables, comparison_text

    records = load_runs(runs)
    if form == "table" and output is None:
        print_comparison(records, everything=all_measures, paired=True)
        _print_differences(records)
        return
    if form == "csv":  # a format without a place for notes
        for table in comparison_tables(records):
            if table.note:
                console.note(f"{table.title}: {table.note}")
    text = comparison_text(records, "markdown" if form == "table" else form, everything=all_measures)
    if output is None:
        typer.echo(console.visible(text.replace("\r\n", "\n")), nl=False)
        return
    with atomic(output) as handle:
        handle.write(text)
    console.note(f"Wrote {output}")


def _print_differences(runs: Sequence[RunRecord]) -> None:
    from stillhouse.report.configuration import config_diff
    from stillhouse.report.record import trained
    from stillhouse.report.seeds import SEED, name_of_seeds, seed_groups

    runs = trained(runs)
    groups = seed_groups(runs)
    if len(groups) == 1:  # the seed is all that differs
        groups = [[index] for index in range(len(runs))]
    names = [name_of_seeds([runs[index].name for index in members]) for members in groups]
    differences = [
        row
        for row in config_diff([runs[members[0]] for members in groups])
        if row.path != SEED or len(groups) == len(runs)
    ]
    if not differences:
        return
    rows = [(row.path, *row.values) for row in differences[:MAX_DIFFERENCES]]
    more = len(differences) - len(rows)
    console.print_table(
        ["setting", *names],
        rows,
        title="Settings that differ",
        note=f"{more} more on the page of `stillhouse report`" if more else "",
    )
