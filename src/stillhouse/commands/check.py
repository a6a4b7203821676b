"""stillhouse check: what a run would do, before it does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile

if TYPE_CHECKING:
    from stillhouse.core.sharding import Parallelism
    from stillhouse.runs.estimate import RunSize
    from stillhouse.runs.measure import MeasuredCost, StepCost
    from stillhouse.runs.memory import Devices, GpuSize
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
        bool,
        typer.Option("--measure", help="Also train two steps aside: predicted and measured memory and time."),
    ] = False,
    gpu_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Estimate for a GPU of so much memory, such as 80GB, instead."),
    ] = None,
    devices: Annotated[
        int, typer.Option(metavar="N", min=1, help="Estimate for one of N processes that train together.")
    ] = 1,
    parallel: Annotated[
        str | None, typer.Option(metavar="NAME", help="How they share the student: ddp, fsdp2, zero2, zero3.")
    ] = None,
) -> None:
    """Validate a YAML file; show what is set with its origin, and the size of the run. Trains nothing, unless
    two steps in a temporary folder are asked for by --measure.

    What is wrong is said before anything else.
    """
    from stillhouse.runs.checks import check_length, preflight
    from stillhouse.runs.estimate import run_size
    from stillhouse.runs.resolve import is_chain, resolve
    from stillhouse.runs.training_arguments import prompts_in_a_micro_batch

    gpu, together = _gpu(gpu_memory), _devices(devices, parallel)
    if is_chain(file):
        given = {"--measure": measure, "--gpu-memory": gpu_memory, "--parallel": parallel}
        alone = [name for name, value in {**given, "--devices": devices > 1}.items() if value]
        _check_chain(file, list(overrides or ()), values, everything, sizes, alone)
        return
    resolved = resolve(file, list(overrides or ()))
    preflight(resolved.config)
    for note in resolved.notes:
        console.note(note)
    prompts_in_a_micro_batch(resolved.config, devices)
    size = run_size(resolved.config, gpu, together) if sizes else None
    for note in check_length(resolved.config, size.rows["prompts"]) if size else ():
        console.note(note)
    found = {} if size is None else size.rows
    if measure:
        found |= _measured(resolved, size, gpu)
    if values:
        _print_values(resolved.provenance, everything)
    if found:
        console.print_table(("quantity", "value"), list(found.items()))
    if size is not None:
        _print_phases(size.memory)


def _check_chain(
    file: Path, overrides: list[str], values: bool, everything: bool, sizes: bool, alone: list[str]
) -> None:
    """Every stage of a chain, those with the students of others by stand-ins for these.

    Raises:
        ConfigError: options were given that are for one run alone.
    """
    from stillhouse.errors import ConfigError, Fault
    from stillhouse.runs.chains.check import check_chain
    from stillhouse.runs.chains.record import ChainFolder
    from stillhouse.runs.chains.resolve import resolve_chain

    if alone:
        hint = "Ask about one of its stages in a file of its own."
        raise ConfigError(*(Fault(name, "is for one run, and this is a chain", hint=hint) for name in alone))
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


def _devices(count: int, parallel: str | None) -> Devices:
    """The processes that --devices and --parallel describe.

    Raises:
        ConfigError: there is no such parallelism, or only one process.
    """
    from stillhouse.core.sharding import SHARDED
    from stillhouse.errors import ConfigError, Fault
    from stillhouse.runs.memory import ALONE, Devices

    if parallel is None:
        return Devices(count)
    if parallel not in SHARDED:
        problem = "is no parallelism that is known"
        raise ConfigError(Fault("--parallel", problem, got=parallel, allowed=", ".join(SHARDED)))
    if count == ALONE.count:
        hint = "Say how many processes train together: --devices 8."
        raise ConfigError(Fault("--parallel", "has no effect for one process", got=parallel, hint=hint))
    return Devices(count, cast("Parallelism", parallel))


def _print_phases(memory: Mapping[str, Mapping[str, float]]) -> None:
    """What each phase takes of the memory of one device, and what of that is most."""
    most = max(sum(parts.values()) for parts in memory.values())
    rows = []
    for phase, parts in memory.items():
        told = [
            f"{name} {_in_gigabytes(size)}"
            for name, size in sorted(parts.items(), key=lambda part: -part[1])
            if size > 0.02 * most
        ]
        rows.append((phase, _in_gigabytes(sum(parts.values())), ", ".join(told)))
    console.print_table(("phase", "memory (GB)", "of which"), rows, title="Memory by phase, estimated")


def _in_gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"


def _measured(resolved: Resolved, size: RunSize | None, gpu: GpuSize | None) -> dict[str, Any]:
    """Train two steps aside; print what was predicted of them and what they took."""
    from stillhouse.console.format import duration
    from stillhouse.runs.estimate import peak_of_steps
    from stillhouse.runs.measure import measure, predict

    with console.phase("Probing this machine with small models"):
        predicted = predict(resolved)
    with console.phase("Training two steps aside"):
        taken = measure(resolved)
    predicted = predicted and predicted.for_tokens(taken.step.tokens)
    memory = None if size is None else peak_of_steps(resolved.config, size, taken.tokens, gpu)
    _print_comparison(taken, predicted, memory)
    if size is None:
        return {}
    return {"training at the measured pace": duration(size.rows["optimiser steps"] * taken.step.seconds)}


def _print_comparison(taken: MeasuredCost, predicted: StepCost | None, memory: float | None) -> None:
    """What was predicted of two steps beside what they took.

    Args:
        taken: what they took.
        predicted: the time of the second one; None where no probe was possible.
        memory: the predicted peak in bytes; None where it was not estimated.
    """
    names = {"student": "student forward"}
    phases = {} if predicted is None else predicted.phases
    said = None if predicted is None else (predicted.seconds, predicted.processor)
    rows: list[tuple[str, float | None, float]] = [
        ("peak memory (GB)", memory and memory / 1e9, taken.peak_memory / 1e9),
        ("seconds a step", said and said[0], taken.step.seconds),
        ("seconds of the processor", said and said[1], taken.step.processor),
        *((names.get(one, one), phases.get(one), seconds) for one, seconds in taken.step.phases.items()),
    ]
    table = [
        (name, _digits(told), _digits(found), f"{told / found:.2f}" if told and found > 0.005 else None)
        for name, told, found in rows
    ]
    notes = (
        [] if predicted else ["Time is not predicted: models of this kind cannot be made with few layers."]
    )
    if taken.share_of_processor < 0.9:
        share = f"{taken.share_of_processor:.0%}"
        notes.append(
            f"The step had {share} of the processor that it asked for: other programs ran, and times by the "
            "clock say little. Those of the processor hold."
        )
    console.print_table(
        ("second of two steps", "predicted", "measured", "ratio"),
        table,
        title="Two steps, predicted and measured",
        note=" ".join(notes),
    )


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


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
