"""What is to be done for each stage of a chain that goes on: nothing, the rest, or all of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

from stillhouse.config import nearest
from stillhouse.errors import ConfigError, Fault
from stillhouse.files import ROWS_FILE
from stillhouse.runs import history
from stillhouse.runs.chains.record import ChainFolder, output_digest
from stillhouse.runs.chains.resolve import Chain
from stillhouse.runs.chains.stages import Stage
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.resolve import STAGES

Action = Literal["skip", "resume", "start"]
MOVED = ("name", "output.folder", "output.report", *history.PLACES)
"""Values whose change leaves a finished stage as it is: what is at a place is compared by its digest."""
LONGER = ("train.epochs", "train.max_steps", "output.dtype")
"""Values that a finished run takes over, and that change its student."""
REDO = "--redo"


def named_stage(chain: Chain, name: str | None, option: str) -> str | None:
    """The name of a stage that an option gives.

    Raises:
        ConfigError: there is no such stage.
    """
    names = [one.name for one in chain.stages]
    if name is not None and name not in names:
        problem = f"no stage is called {name!r}{nearest(name, names)}"
        raise ConfigError(Fault(option, problem, allowed=", ".join(names)))
    return name


def planned(chain: Chain, folder: ChainFolder, redo: str | None) -> dict[str, Action]:
    """What is to be done for each stage, in order.

    Args:
        chain: the chain.
        folder: its folder, as it is.
        redo: the stage that is made anew, with all that follow from it.

    Raises:
        ConfigError: stages that have begun cannot go on as they are; the message names the way out.
    """
    anew = () if redo is None else (redo, *chain.following(redo))
    plan: dict[str, Action] = {}
    faults: list[Fault] = []
    for stage in chain.stages:
        if stage.name in anew or not folder.started(stage.name):
            plan[stage.name] = "start"
            continue
        faults += stale(chain, folder, stage, plan)
        plan[stage.name] = _action(folder, stage)
    if faults:
        raise ConfigError(*faults)
    return plan


def stale(chain: Chain, folder: ChainFolder, stage: Stage, plan: dict[str, Action]) -> list[Fault]:
    """Why a stage that has begun cannot go on, or is no longer what the chain would make.

    Args:
        chain: the chain.
        folder: its folder.
        stage: one that has begun.
        plan: what will have been done for the stages before it.
    """
    before = folder.stage(stage.name).get("inputs")
    if before is None:
        return []
    now = (
        {} if any(_remade(folder, one, plan, chain) for one in stage.after) else inputs(chain, folder, stage)
    )
    faults = [
        _fault(
            stage, f"was made from another {name} than there is now: digest {old[:12]}, now {now[name][:12]}"
        )
        for name, old in before.items()
        if name in now and now[name] != old
    ]
    faults += [
        _fault(stage, f"was made from what {one} left, which is now to be made otherwise")
        for one in stage.after
        if _remade(folder, one, plan, chain)
    ]
    output = folder.stage(stage.name).get("output")
    if output is not None and not faults and output_digest(stage.folder) != output:
        left = f"student ({stage.folder / 'student'}) has"
        if stage.leaves_rows:
            left = f"rows ({stage.folder / ROWS_FILE}) have"
        faults.append(_fault(stage, f"its {left} been changed since it was made"))
    return faults or _changed(stage, finished=folder.finished(stage.name))


def _remade(folder: ChainFolder, name: str, plan: dict[str, Action], chain: Chain) -> bool:
    """Whether the student of an earlier stage will be another one."""
    if plan[name] == "start":
        return True
    stage = next(one for one in chain.stages if one.name == name)
    return folder.finished(name) and any(_matches(path, LONGER) for path in _changes(stage))


def _changed(stage: Stage, finished: bool) -> list[Fault]:
    """Values that a run in this state does not take over."""
    try:
        history.check_changes(_changes(stage), stage.folder, finished)
    except ConfigError as error:
        found = [fault for fault in error.faults if isinstance(fault, Fault)]
        return [replace(_fault(stage, fault.problem), got=fault.got) for fault in found]
    return []


def _changes(stage: Stage) -> history.Changes:
    before = RunFolder(stage.folder).facts("provenance.json")
    return history.changed_values(before, stage.provenance)


def _action(folder: ChainFolder, stage: Stage) -> Action:
    if not folder.finished(stage.name):
        return "resume"
    return "skip" if all(_matches(path, MOVED) for path in _changes(stage)) else "resume"


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _fault(stage: Stage, problem: str) -> Fault:
    hint = f"Make it anew, with all that follows from it: {REDO} {stage.name}; or put back what was there."
    return Fault(f"{STAGES}.{stage.name}", problem, hint=hint)


def inputs(chain: Chain, folder: ChainFolder, stage: Stage) -> dict[str, str]:
    """Digests of all that a stage is made from: students of earlier stages, data and other models."""
    earlier = {f"{STAGES}.{name}": output_digest(chain.folder_of(name)) for name in stage.after}
    return {**earlier, **stage.outside(chain.folder)}


def clear(chain: Chain, folder: ChainFolder, redo: str) -> tuple[str, ...]:
    """Delete a stage and all that follow from it; their names."""
    found = tuple(one for one in (redo, *chain.following(redo)) if folder.started(one))
    for name in reversed(found):
        folder.note_stage(name)
        shutil.rmtree(chain.folder_of(name))
    return found
