"""stillhouse check: what a run would do, before it does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from stillhouse import console
from stillhouse.commands.app import RUN, app
from stillhouse.commands.options import Overrides, RunFile
from stillhouse.errors import ConfigError, Fault

if TYPE_CHECKING:
    from stillhouse.core.sharding import Parallelism
    from stillhouse.runs.config import RunConfig
    from stillhouse.runs.estimate import RunSize
    from stillhouse.runs.measure import MeasuredCost, StepCost
    from stillhouse.runs.memory import Devices, GpuSize
    from stillhouse.runs.size_facts import Machine

VERSION = 1
"""Of the keys that --json prints; a key that changes its meaning or goes makes it one more."""

SMALLEST_GPU = 10**6
"""Bytes; what is less was meant in another unit."""

Parallel = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="How they share the student: ddp, fsdp2, hsdp, zero2, zero3."),
]
ShardSize = Annotated[
    int | None,
    typer.Option(metavar="N", min=2, help="With hsdp: over how many of them a replica is sharded."),
]


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
    parallel: Parallel = None,
    shard_size: ShardSize = None,
    servers: Annotated[
        bool, typer.Option(help="Ask the servers that hold teachers, which have to be up then.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of tables; docs/estimates.md has its keys.")
    ] = False,
) -> None:
    """Validate a YAML file; show what is set with its origin, and the size of the run. Trains nothing, unless
    two steps in a temporary folder are asked for by --measure.

    What is wrong is said before anything else.
    """
    from stillhouse.runs.memory import ALONE
    from stillhouse.runs.resolve import is_chain, is_reward_run
    from stillhouse.runs.size_facts import Machine

    machine = Machine(_gpu(gpu_memory), _devices(devices, parallel, shard_size), servers)
    if measure and not servers:
        raise ConfigError(Fault("--measure", "trains two steps, which ask the servers; got --no-servers too"))
    if measure and machine.devices != ALONE:
        hint = "Ask for one of them: the time of several processes is that of a run of theirs."
        raise ConfigError(
            Fault("--measure", "trains two steps in one process, and --devices is about several", hint=hint)
        )
    shown = Shown(values, everything, sizes, as_json)
    texts = list(overrides or ())
    if is_chain(file):
        _check_chain(file, texts, shown, machine, measure)
    elif is_reward_run(file):
        if measure:
            raise ConfigError(Fault("--measure", "is for runs, and this is a reward model"))
        _check_reward(file, texts, shown, machine)
    else:
        _check_run(file, texts, shown, machine, measure)


@dataclass(frozen=True, slots=True)
class Shown:
    """What is printed of what was found.

    Example: `Shown(values=True, everything=False, sizes=True, as_json=False)`
    """

    values: bool
    everything: bool
    sizes: bool
    as_json: bool

    def json(self, found: Mapping[str, Any]) -> None:
        """All of it on standard output."""
        typer.echo(console.json_text({"version": VERSION, **found}, indent=2))


def _check_run(file: Path, overrides: list[str], shown: Shown, machine: Machine, measure: bool) -> None:
    """One run."""
    from stillhouse.runs import check_text
    from stillhouse.runs.checks import check_length, preflight
    from stillhouse.runs.estimate import run_size
    from stillhouse.runs.resolve import resolve
    from stillhouse.runs.size_facts import REMEDY
    from stillhouse.runs.training_arguments import prompts_in_a_micro_batch

    resolved = resolve(file, overrides)
    preflight(resolved.config)
    prompts_in_a_micro_batch(resolved.config, machine.devices.count)
    size = run_size(resolved.config, machine.gpu, machine.devices, machine.online) if shown.sizes else None
    notes = [*resolved.notes, *(check_length(resolved.config, size.rows["prompts"]) if size else ())]
    for note in notes:
        console.note(note)
    measured = _measured(resolved.config, size, machine.gpu) if measure else TwoSteps()
    if shown.as_json:
        found: dict[str, Any] = {"kind": "run", "name": resolved.config.name, "notes": notes}
        if size is not None:
            found |= {"size": size.facts, "details": size.rows}
        if measure:
            found |= _measured_keys(measured)
        shown.json(found | ({"values": resolved.provenance} if shown.values else {}))
        return
    if size is not None:
        name, unknown = resolved.config.name, "unknown; --measure trains two steps to find out"
        check_text.print_summary(name, size.facts, measured.time, REMEDY, unknown)
    if measured.taken is not None:
        check_text.print_comparison(measured.taken, measured.predicted, measured.memory)
    if measured.time is not None:
        check_text.print_times(measured.time)
    if size is not None:
        check_text.print_phases(size.memory)
        check_text.print_details(size.rows)
    if shown.values:
        check_text.print_values(resolved.provenance, shown.everything)


def _check_chain(file: Path, overrides: list[str], shown: Shown, machine: Machine, measure: bool) -> None:
    """Every stage of a chain, those with the students of others by stand-ins for these."""
    from stillhouse.runs import check_text
    from stillhouse.runs.chains.check import check_chain
    from stillhouse.runs.chains.record import ChainFolder
    from stillhouse.runs.chains.resolve import resolve_chain
    from stillhouse.runs.size_facts import REMEDY

    chain = resolve_chain(file, overrides)
    folder = ChainFolder(chain)
    done = [one.name for one in chain.stages if folder.finished(one.name)]
    measured: dict[str, TwoSteps] = {}

    def try_out(name: str, config: RunConfig, size: RunSize) -> None:
        console.note(f"{name}:")
        measured[name] = _measured(config, size, machine.gpu)

    found = check_chain(chain, there=done, machine=machine, try_out=try_out if measure else None)
    for note in chain.notes:
        console.note(note)
    sizes = {name: size.facts for name, size in found.items()}
    stages: dict[str, dict[str, Any]] = {
        stage.name: {
            "does": stage.what,
            "after": list(stage.after),
            "folder": str(stage.folder),
            **({"size": sizes[stage.name], "details": found[stage.name].rows} if shown.sizes else {}),
            **(_measured_keys(measured.get(stage.name, TwoSteps())) if measure else {}),
            **({"values": stage.provenance} if shown.values else {}),
        }
        for stage in chain.stages
    }
    times = {name: measured.get(name, TwoSteps()).time for name in stages} if measure else {}
    total = check_text.chain_total(sizes, times)
    if shown.as_json:
        more = {"total": total} if shown.sizes else {}
        shown.json({"kind": "chain", "notes": list(chain.notes), "stages": stages, **more})
        return
    if shown.sizes:
        check_text.print_chain(stages, total, REMEDY)
    rows = [(one.name, one.what, ", ".join(one.after), str(one.folder)) for one in chain.stages]
    console.print_table(("stage", "does", "from", "folder"), rows)
    for stage in chain.stages:
        if shown.sizes:
            check_text.print_details(found[stage.name].rows, f"{stage.name}: size")
        if shown.values:
            check_text.print_values(stage.provenance, shown.everything, f"{stage.name}: values")


def _check_reward(file: Path, overrides: list[str], shown: Shown, machine: Machine) -> None:
    """The training of a reward model."""
    from stillhouse.runs import check_text
    from stillhouse.runs.memory import ALONE
    from stillhouse.runs.reward import reward_run
    from stillhouse.runs.reward_size import reward_size, reward_values
    from stillhouse.runs.size_facts import REWARD_REMEDY

    if machine.devices != ALONE:
        raise ConfigError(Fault("--devices", "a reward model is trained by one process"))
    config = reward_run(file, overrides)
    size = reward_size(config, machine) if shown.sizes else None
    values = reward_values(file, overrides)
    if shown.as_json:
        found: dict[str, Any] = {"kind": "reward", "name": config.name}
        if size is not None:
            found |= {"size": size.facts, "details": size.rows}
        shown.json(found | ({"values": values} if shown.values else {}))
        return
    if size is not None:
        unknown = "unknown: it is not measured for reward models"
        check_text.print_summary(config.name, size.facts, None, REWARD_REMEDY, unknown)
        check_text.print_phases(size.facts["memory_bytes"]["phases"])
        check_text.print_details(size.rows)
    if shown.values:
        check_text.print_values(values, shown.everything)


def _gpu(memory: str | None) -> GpuSize | None:
    """The GPU that --gpu-memory describes.

    Raises:
        ConfigError: it is no size, or a number of bytes that was meant to be one of gigabytes.
    """
    from stillhouse.config.sizes import parse_bytes
    from stillhouse.runs.memory import GpuSize

    if memory is None:
        return None
    try:
        size = parse_bytes(memory)
    except ValueError as error:
        raise ConfigError(Fault("--gpu-memory", str(error), got=memory)) from error
    if size < SMALLEST_GPU:
        hint = "Say the unit: 80GB."
        raise ConfigError(Fault("--gpu-memory", f"is {size} bytes, which no GPU has", got=memory, hint=hint))
    return GpuSize(f"a GPU of {memory}", size)


def _devices(count: int, parallel: str | None, shard_size: int | None) -> Devices:
    """The processes that --devices, --parallel and --shard-size describe.

    Raises:
        ConfigError: there is no such parallelism, or only one process, or it does not come to whole replicas.
    """
    from stillhouse.core.sharding import SHARDED
    from stillhouse.runs.memory import ALONE, Devices

    if shard_size is not None and parallel != "hsdp":
        hint = "Leave it out, or say --parallel hsdp: the others shard over all devices."
        raise ConfigError(Fault("--shard-size", "has no effect", got=str(shard_size), hint=hint))
    if parallel is None:
        return Devices(count)
    if parallel not in SHARDED:
        problem = "is no parallelism that is known"
        raise ConfigError(Fault("--parallel", problem, got=parallel, allowed=", ".join(SHARDED)))
    if count == ALONE.count:
        hint = "Say how many processes train together: --devices 8."
        raise ConfigError(Fault("--parallel", "has no effect for one process", got=parallel, hint=hint))
    if parallel == "hsdp" and shard_size is None:
        hint = "Say how many devices hold a replica together, as a rule those of a machine: --shard-size 8."
        raise ConfigError(Fault("--parallel", "needs a --shard-size", got=parallel, hint=hint))
    if shard_size is not None and (count % shard_size or count == shard_size):
        problem = f"does not divide {count} devices into two replicas or more"
        allowed = ", ".join(str(size) for size in range(2, count) if count % size == 0) or "none"
        hint = "Over all of them it is --parallel fsdp2."
        raise ConfigError(Fault("--shard-size", problem, got=str(shard_size), allowed=allowed, hint=hint))
    return Devices(count, cast("Parallelism", parallel), shard_size)


@dataclass(frozen=True, slots=True)
class TwoSteps:
    """Two steps aside, where they were asked for."""

    taken: MeasuredCost | None = None
    predicted: StepCost | None = None
    memory: float | None = None
    """The predicted peak in bytes; None where it was not estimated."""
    facts: dict[str, Any] | None = None
    time: dict[str, Any] | None = None
    """Of the whole run; None without its size."""


def _measured_keys(measured: TwoSteps) -> dict[str, Any]:
    """For --json."""
    return {"time": measured.time, "two_steps": measured.facts}


def _measured(config: RunConfig, size: RunSize | None, gpu: GpuSize | None) -> TwoSteps:
    """Train two steps aside; what was predicted of them and what they took."""
    from stillhouse.runs.check_text import steps_facts, time_facts
    from stillhouse.runs.estimate import peak_of_steps
    from stillhouse.runs.measure import measure, predict
    from stillhouse.runs.wall_time import time_of_run

    with console.phase("Probing this machine with small models"):
        predicted = predict(config)
    with console.phase("Training two steps aside"):
        taken = measure(config)
    predicted = predicted and predicted.for_tokens(taken.step.tokens)
    memory = None if size is None else peak_of_steps(config, size, taken.tokens, gpu)
    time = None
    if size is not None:
        time = time_facts(*(time_of_run(config, size, one) for one in (taken.run, taken.run_processor)))
    return TwoSteps(taken, predicted, memory, steps_facts(taken, predicted, memory), time)
