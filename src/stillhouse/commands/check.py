"""stillhouse check: what a run would do, before it does it."""

from __future__ import annotations

from typing import Annotated

import typer

from stillhouse.commands.arguments import Overrides, RunFile


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("check")(command)


def command(
    file: RunFile,
    overrides: Overrides = None,
    values: Annotated[bool, typer.Option(help="Show every value and where it comes from.")] = True,
    sizes: Annotated[
        bool, typer.Option(help="Read data and model configurations to count tokens, steps and memory.")
    ] = True,
) -> None:
    """Check a YAML file and show its values with their origin, and the size of the run. Trains nothing."""
    from stillhouse.runs.checking import show_sizes, show_values
    from stillhouse.runs.preflight import preflight
    from stillhouse.runs.resolve import resolve

    resolved = resolve(file, list(overrides or ()))
    if values:
        show_values(resolved)
    preflight(resolved.config)
    if sizes:
        show_sizes(resolved.config)
