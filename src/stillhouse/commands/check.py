"""stillhouse check: what a run would do, before it does it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile


@app.command("check", rich_help_panel=RUN)
def check(
    file: RunFile,
    overrides: Overrides = None,
    values: Annotated[bool, typer.Option(help="Show every value and where it comes from.")] = True,
    sizes: Annotated[
        bool, typer.Option(help="Read data and model configurations to count tokens, steps and memory.")
    ] = True,
) -> None:
    """Validate a YAML file; show its values with their origin, and the size of the run. Trains nothing."""
    from stillhouse.runs.checks import preflight
    from stillhouse.runs.estimate import estimate
    from stillhouse.runs.resolve import resolve

    resolved = resolve(file, list(overrides or ()))
    if values:
        rows = [(path, _shown(fact["value"]), fact["origin"]) for path, fact in resolved.provenance.items()]
        rows.sort(key=lambda row: row[2] == "default")  # what the user or the recipe set comes first
        console.print_table(("value", "is", "from"), rows)
    preflight(resolved.config)
    if sizes:
        console.print_table(("quantity", "value"), list(estimate(resolved.config).items()))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
