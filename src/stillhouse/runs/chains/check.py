"""What can be refused before the first stage of a chain begins: everything but what the weights will be."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from stillhouse.runs.chains.faults import in_stage
from stillhouse.runs.chains.references import PREFIX, with_stand_ins
from stillhouse.runs.chains.resolve import Chain
from stillhouse.runs.chains.stages import Stage, add_weights
from stillhouse.runs.config import RunConfig
from stillhouse.runs.estimate import RunSize, StageSize
from stillhouse.runs.size_facts import HERE, Machine

logger = logging.getLogger("stillhouse")


TryOut = Callable[[str, RunConfig, RunSize], None]
"""Given the name of a stage, its configuration with stand-ins, and its size."""


def check_chain(
    chain: Chain,
    there: Collection[str] = (),
    quiet: bool = True,
    machine: Machine = HERE,
    try_out: TryOut | None = None,
) -> dict[str, StageSize]:
    """Check every stage with its data and models; what earlier stages have not left yet is stood in for.

    A stand-in has the configuration and the tokenizer that the student will have, and no weights: whether it
    fits a later stage's teacher, lengths and layers is known by these.

    Args:
        chain: the chain.
        there: stages that are finished, whose students are read themselves.
        quiet: leave out what each stage will tell anyway when it runs.
        machine: what the memory is estimated for.
        try_out: called with each stage that trains, as long as the stand-ins are there, which have random
            weights then.

    Returns:
        The size of each stage, by name.

    Raises:
        StillhouseError: what is wrong with the first stage that cannot run; the message begins with its name.
    """
    found: dict[str, StageSize] = {}
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder, _quietly(quiet):
        stand_ins: dict[str, str] = {}
        for stage in chain.stages:
            meant = {path: f"{PREFIX}{Path(path).name}" for path in stand_ins.values()}
            with in_stage(stage.name, meant):
                config = None if stage.config is None else with_stand_ins(stage.config, stand_ins)
                size = stage.check(config, stand_ins, machine)
                taken = _counted(chain, stage, stand_ins)
                found[stage.name] = replace(size, rows={**size.rows, **taken})
                if try_out is not None and config is not None and size.run is not None:
                    try_out(stage.name, config, size.run)
                if stage.name not in there:
                    place = Path(folder) / stage.name
                    stage.write_stand_in(config, stand_ins, place)
                    if try_out is not None:
                        add_weights(place)
                    stand_ins[str(stage.folder)] = str(place)
    return found


def _counted(chain: Chain, stage: Stage, stand_ins: Collection[str]) -> dict[str, str]:
    """What the size of a stage takes for granted of rows that are not written yet."""
    return {
        f"rows of {one.name}": "not written yet, counted as if all were left, at full length"
        for one in chain.stages
        if one.leaves_rows and one.name in stage.after and str(one.folder) in stand_ins
    }


@contextlib.contextmanager
def _quietly(quiet: bool) -> Iterator[None]:
    before = logger.level
    if quiet:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
