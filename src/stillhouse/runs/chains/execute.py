"""Runs a chain from its first stage to its last, each into the run folder of its name."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial

from stillhouse import console
from stillhouse.core.distributed import barrier, first_alone, rank_and_size
from stillhouse.errors import ConfigError
from stillhouse.runs.chains.check import check_chain
from stillhouse.runs.chains.faults import in_stage
from stillhouse.runs.chains.plan import Action, clear, inputs, named_stage, planned, stale
from stillhouse.runs.chains.record import ChainFolder, output_digest
from stillhouse.runs.chains.resolve import Chain
from stillhouse.runs.chains.stages import Stage
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.result import Result, headline


def run_chain(
    chain: Chain, *, resume: bool = False, redo: str | None = None, until: str | None = None
) -> Result:
    """Run the stages of a chain in order; everything is checked before the first one begins.

    Args:
        chain: what `resolve_chain` returned.
        resume: leave finished stages as they are, if they are what the chain would make, and go on.
        redo: make this stage anew, and all that follow from it; implies `resume`.
        until: end after this stage.

    Returns:
        The chain's folder, how it ended, and the result of each stage; the metrics are those of the last.

    Raises:
        StillhouseError: a stage cannot be what it should; the message begins with its name.
    """
    named_stage(chain, redo, "--redo")
    named_stage(chain, until, "--until")
    resume = resume or redo is not None
    folder = ChainFolder(chain)
    with folder.alone("--resume" if resume else "output.folder"):
        folder.check(resume)
        plan = planned(chain, folder, redo)
        for note in chain.notes:
            console.warn(note)
        with console.phase("Checking all stages"):
            check_chain(chain, there=[name for name, action in plan.items() if action == "skip"])
        barrier(rank_and_size()[1])  # all have seen the folder before the first one writes
        try:
            with folder.recorded():
                for name in clear(chain, folder, redo) if redo is not None and folder.main else ():
                    console.note(f"{name}: deleted, to be made anew")
                return _run_stages(chain, folder, plan, until)
        finally:
            if chain.report and folder.main:
                _write_report(folder)


def _run_stages(chain: Chain, folder: ChainFolder, plan: Mapping[str, Action], until: str | None) -> Result:
    results: dict[str, Result] = {}
    for number, stage in enumerate(chain.stages, start=1):
        title = f"Stage {number} of {len(chain.stages)}, {stage.name} ({stage.what})"
        if plan[stage.name] == "skip":
            console.note(f"{title}: finished before")
            results[stage.name] = Result(stage.folder, "done", headline(RunFolder(stage.folder)))
        else:
            console.note(title)
            results[stage.name] = _run_stage(chain, folder, stage, plan)
        result = results[stage.name]
        if result.state != "done" or stage.name == until:
            folder.stopped = f"ended after {stage.name} (--until)"
            if result.signal is not None:
                folder.stopped = f"stopped by {result.signal.name} in {stage.name}"
            break
    last = results[stage.name]
    state = "done" if stage is chain.stages[-1] else "interrupted"
    state = last.state if last.state != "done" else state
    return Result(chain.folder, state, last.metrics, last.signal, results)


def _run_stage(chain: Chain, folder: ChainFolder, stage: Stage, plan: Mapping[str, Action]) -> Result:
    """Run one stage, and record what it was made from and what it has left."""
    going_on = plan[stage.name] == "resume"
    if going_on and (faults := stale(chain, folder, stage, {**plan, **dict.fromkeys(stage.after, "skip")})):
        raise ConfigError(*faults)  # a stage before it has gone on, and its student has changed
    if not going_on:
        folder.note_stage(stage.name)
        folder.note_stage(stage.name, inputs=inputs(chain, folder, stage))
    with in_stage(stage.name):
        result = _run_together(stage, going_on)
    gc.collect()  # models in cycles would take the memory of the next stage
    if result.state == "done":
        folder.note_stage(stage.name, output=output_digest(stage.folder))
    return result


def _run_together(stage: Stage, resume: bool) -> Result:
    """Run a stage in all processes, or in the first one while the others wait for it."""
    if not stage.distributed:
        return first_alone(partial(stage.run, resume))
    result = stage.run(resume)
    barrier(rank_and_size()[1], patient=True)  # the first one writes on when the others are through
    return result


def _write_report(folder: ChainFolder) -> None:
    from stillhouse.report import write_report

    if any(folder.started(stage.name) for stage in folder.chain.stages):
        console.note(f"Report: {write_report([folder.path], folder.report)}")
