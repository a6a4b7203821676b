"""stillhouse check: what a run would do, before it does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile


@app.command("check", rich_help_panel=RUN)
def check(
    file: RunFile,
    overrides: Overrides = None,
    values: Annotated[bool, typer.Option(help="Show values and where each comes from.")] = True,
    everything: Annotated[
        bool, typer.Option("--all", help="Also the values that are defaults, not only those that were set.")
    ] = False,
    sizes: Annotated[
        bool, typer.Option(help="Read data and model configurations to count tokens, steps and memory.")
    ] = True,
) -> None:
    """Validate a YAML file; show what is set with its origin, and the size of the run. Trains nothing.

    What is wrong is said before anything else.
    """
    from stillhouse.runs.checks import preflight
    from stillhouse.runs.estimate import estimate
    from stillhouse.runs.resolve import resolve

    resolved = resolve(file, list(overrides or ()))
    preflight(resolved.config)
    for note in resolved.notes:
        console.note(note)
    found = estimate(resolved.config) if sizes else {}
    if values:
        _print_values(resolved.provenance, everything)
    if found:
        console.print_table(("quantity", "value"), list(found.items()))


def _print_values(provenance: Mapping[str, Mapping[str, Any]], everything: bool) -> None:
    rows = [(path, _shown(fact["value"]), str(fact["origin"])) for path, fact in provenance.items()]
    chosen = [row for row in rows if row[2] != "default"]
    defaults = [row for row in rows if row[2] == "default"] if everything else []
    left_out = len(rows) - len(chosen) - len(defaults)
    note = f"{left_out} more values are defaults; --all shows them." if left_out else ""
    console.print_table(("value", "is", "from"), [*chosen, *defaults], note=note)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
