"""stillhouse check: what a run would do, before it does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile

if TYPE_CHECKING:
    from stillhouse.runs.memory import GpuSize
    from stillhouse.runs.resolve import Resolved


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
    measure: Annotated[
        bool, typer.Option("--measure", help="Also train two steps aside: the memory and time they take.")
    ] = False,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Estimate for a GPU of so much memory, such as 80GB, instead."),
    ] = None,
) -> None:
    """Validate a YAML file; show what is set with its origin, and the size of the run. Trains nothing, unless
    two steps in a temporary folder are asked for by --measure.

    What is wrong is said before anything else.
    """
    from stillhouse.runs.chains.resolve import is_chain
    from stillhouse.runs.checks import check_length, preflight
    from stillhouse.runs.estimate import estimate
    from stillhouse.runs.resolve import resolve

    gpu = _gpu(gpu_memory)
    if is_chain(file):
        _check_chain(file, list(overrides or ()), values, everything, sizes, measure)
        return
    resolved = resolve(file, list(overrides or ()))
    preflight(resolved.config)
    for note in resolved.notes:
        console.note(note)
    found = estimate(resolved.config, gpu) if sizes else {}
    for note in check_length(resolved.config, found["prompts"]) if found else ():
        console.note(note)
    if measure:
        found |= _measured(resolved, found)
    if values:
        _print_values(resolved.provenance, everything)
    if found:
        console.print_table(("quantity", "value"), list(found.items()))


def _check_chain(
    file: Path, overrides: list[str], values: bool, everything: bool, sizes: bool, measure: bool
) -> None:
    """Every stage of a chain, those with the students of others by stand-ins for these."""
    from stillhouse.errors import ConfigError, Fault
    from stillhouse.runs.chains.check import check_chain
    from stillhouse.runs.chains.record import ChainFolder
    from stillhouse.runs.chains.resolve import resolve_chain

    if measure:
        hint = "Measure one of its stages in a file of its own."
        raise ConfigError(Fault("--measure", "trains two steps of one run, and this is a chain", hint=hint))
    chain = resolve_chain(file, overrides)
    folder = ChainFolder(chain)
    found = check_chain(chain, there=[one.name for one in chain.stages if folder.finished(one.name)])
    for note in chain.notes:
        console.note(note)
    rows = [(one.name, one.what, ", ".join(one.after), str(one.folder)) for one in chain.stages]
    console.print_table(("stage", "does", "from", "folder"), rows)
    for stage in chain.stages:
        if values:
            _print_values(stage.provenance, everything, f"{stage.name}: values")
        if sizes:
            console.print_table(
                ("quantity", "value"), list(found[stage.name].items()), title=f"{stage.name}: size"
            )


def _gpu(memory: str | None) -> GpuSize | None:
    """The GPU that --gpu-memory describes.

    Raises:
        ConfigError: it is no size.
    """
    from stillhouse.config.sizes import parse_bytes
    from stillhouse.errors import ConfigError, Fault
    from stillhouse.runs.memory import GpuSize

    if memory is None:
        return None
    try:
        return GpuSize(f"a GPU of {memory}", parse_bytes(memory))
    except ValueError as error:
        raise ConfigError(Fault("--gpu-memory", str(error), got=memory)) from error


def _measured(resolved: Resolved, found: Mapping[str, Any]) -> dict[str, Any]:
    from stillhouse.console.format import duration
    from stillhouse.runs.measure import measure

    with console.phase("Training two steps aside"):
        taken = measure(resolved)
    rows: dict[str, Any] = {"peak memory, measured (GB)": round(taken.peak_memory / 1e9, 2)}
    rows["seconds a step, measured"] = float(f"{taken.seconds_per_step:.3g}")
    if steps := found.get("optimiser steps"):
        rows["training at that pace"] = duration(steps * taken.seconds_per_step)
    return rows


def _print_values(provenance: Mapping[str, Mapping[str, Any]], everything: bool, title: str = "") -> None:
    rows = [(path, _shown(fact["value"]), str(fact["origin"])) for path, fact in provenance.items()]
    chosen = [row for row in rows if row[2] != "default"]
    defaults = [row for row in rows if row[2] == "default"] if everything else []
    left_out = len(rows) - len(chosen) - len(defaults)
    note = f"{left_out} more values are defaults; --all shows them." if left_out else ""
    console.print_table(("value", "is", "from"), [*chosen, *defaults], title=title, note=note)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
