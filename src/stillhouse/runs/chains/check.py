"""What can be refused before the first stage of a chain begins: everything but what the weights will be."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from stillhouse.runs.chains.faults import in_stage
from stillhouse.runs.chains.references import PREFIX, with_stand_ins
from stillhouse.runs.chains.resolve import Chain
from stillhouse.runs.chains.stages import Stage

logger = logging.getLogger("stillhouse")


def check_chain(chain: Chain, there: Collection[str] = (), quiet: bool = True) -> dict[str, dict[str, Any]]:
    """Check every stage with its data and models; what earlier stages have not left yet is stood in for.

    A stand-in has the configuration and the tokenizer that the student will have, and no weights: whether it
    fits a later stage's teacher, lengths and layers is known by these.

    Args:
        chain: the chain.
        there: stages that are finished, whose students are read themselves.
        quiet: leave out what each stage will tell anyway when it runs.

    Returns:
        The size of each stage, by name.

    Raises:
        StillhouseError: what is wrong with the first stage that cannot run; the message begins with its name.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder, _quietly(quiet):
        stand_ins: dict[str, str] = {}
        for stage in chain.stages:
            meant = {path: f"{PREFIX}{Path(path).name}" for path in stand_ins.values()}
            with in_stage(stage.name, meant):
                config = None if stage.config is None else with_stand_ins(stage.config, stand_ins)
                found[stage.name] = stage.check(config, stand_ins) | _counted(chain, stage, stand_ins)
                if stage.name not in there:
                    place = Path(folder) / stage.name
                    stage.write_stand_in(config, stand_ins, place)
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
