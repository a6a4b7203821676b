"""stillhouse report: one page for one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse import console
from stillhouse.errors import DataError


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("report")(command)


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, or folders that hold some.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page; default: report.html in the first folder."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Headline of the page.")] = None,
) -> None:
    """Write one self-contained HTML page for a run, or a comparison of several."""
    from stillhouse.report import write_report

    folders = [folder for given in runs for folder in _run_folders(given)]
    page = write_report(folders, output or runs[0] / "report.html", title)
    console.output().print(str(page))


def _run_folders(folder: Path) -> list[Path]:
    if (folder / "state.json").exists():
        return [folder]
    found = sorted(state.parent for state in folder.glob("*/state.json"))
    if not found:
        raise DataError(f"{folder}: holds no run (no state.json in it or in its folders).")
    return found
