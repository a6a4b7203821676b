"""stillhouse sweep: runs that differ in some of their values."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse import console, signals
from stillhouse.commands.app import RUN, Interrupted, app
from stillhouse.commands.options import Overrides

if TYPE_CHECKING:
    from stillhouse.runs.sweep import SweepPlan, SweepResult

SHOWN = (
    "optimiser steps",
    "student parameters",
    "teacher cache, expected (GB)",
    "peak memory, estimated (GB)",
)
"""Of what `stillhouse check` says of a run: the columns of the table of runs."""


@app.command("sweep", rich_help_panel=RUN)
def sweep(
    file: Annotated[
        Path, typer.Argument(help="YAML file of the sweep.", metavar="SWEEP.YAML", show_default=False)
    ],
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time, each in its own process.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every run and show the table of runs; train nothing.")
    ] = False,
) -> None:
    """Train runs that differ in some of their values, and compare them on one page. The same command goes on
    where an interrupted sweep has stopped, and tries failed runs again.

    Every combination is checked before the first run starts. NAME=VALUE changes the sweep; with run. before
    the name, the run that all have in common.
    """
    from stillhouse.runs.sweep import SweepPlan, execute_sweep

    plan = SweepPlan(file, list(overrides or ()))
    if dry_run:
        _show_plan(plan)
        return
    try:
        result = execute_sweep(plan, workers)
    except KeyboardInterrupt as error:
        more = [*(overrides or ()), *(["--workers", str(workers)] if workers > 1 else [])]
        command = shlex.join(["stillhouse", "sweep", str(file), *more])
        console.note(f"Interrupted by {signals.name_of(error)}. Continue with: {command}")
        raise Interrupted(signals.exit_code_of(error)) from error
    _show_result(plan, result)
    if result.count("failed"):
        raise typer.Exit(3)


def _show_plan(plan: SweepPlan) -> None:
    """The runs with the size of each, as `stillhouse check` estimates it."""
    from stillhouse.runs.sweep import checked_members

    for note in plan.notes():
        console.note(note)
    members, refused = checked_members(plan)
    sizes = [member.size for member in members]
    shown = [name for name in SHOWN if any(name in one for one in sizes)]
    states = [plan.folder.state_of(member.name)[0] for member in members]
    rows = [
        (member.name, *member.labels.values(), *(size.get(name) for name in shown), state)
        for member, size, state in zip(members, sizes, states, strict=True)
    ]
    several = plan.config.search.kind != "grid"
    title = f"{len(members)} combinations with each value once" if several else f"{len(members)} runs"
    console.print_table(
        ("run", *members[0].labels, *shown, "state"), rows, title=title, note=_refused(refused.names)
    )
    steps = sum(size.get("optimiser steps", 0) for size in sizes)
    if not several:
        console.say(f"{steps:,} optimiser steps in all, into {plan.folder.path}")


def _show_result(plan: SweepPlan, result: SweepResult) -> None:
    from stillhouse.errors import DataError
    from stillhouse.report import load_runs, print_comparison

    try:
        print_comparison(load_runs([result.folder]), paired=True)
    except DataError:
        console.note("No run has begun.")
    counts = {state: result.count(state) for state in dict.fromkeys(result.states.values())}
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    console.say(f"{len(result.states)} runs: {told}. {_refused(result.refused)}".rstrip())
    for name, state in result.states.items():
        if state == "failed":
            message = plan.folder.state_of(name)[1] or str(plan.folder.lines[name].get("message", ""))
            console.warn(f"{name}: {message.splitlines()[0] if message else 'failed'}")
    if result.count("failed"):
        console.note("The same command tries failed runs again.")


def _refused(names: dict[str, dict[str, str]]) -> str:
    if not names:
        return ""
    shown = ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} combinations were refused by the checks and left out ({shown})."
