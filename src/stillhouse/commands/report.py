"""stillhouse report: one page for one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.commands.app import RESULTS, app
from stillhouse.commands.options import RunFolders


@app.command("report", rich_help_panel=RESULTS)
def report(
    runs: RunFolders,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page; default: report.html in the folder, for several beside it.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Headline of the page.")] = None,
) -> None:
    """Write one self-contained HTML page for a run, or for a comparison of several."""
    from stillhouse.report import write_report

    place = runs[0] if len(runs) == 1 else runs[0].absolute().parent  # a run's own page stays its own
    page = write_report(runs, output or place / "report.html", title)
    console.say(str(page))
