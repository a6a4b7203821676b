"""Runs a sweep: what is not finished, in processes of their own, until all have come to an end."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from stillhouse import console, signals
from stillhouse.config.layers import OF_THE_SWEEP
from stillhouse.errors import ConfigError, DataError
from stillhouse.runs import history
from stillhouse.runs.folder import RunFolder, default_folder
from stillhouse.runs.sweep.folder import SweepFolder
from stillhouse.runs.sweep.plan import Member, Refusals, SweepPlan, metric_of
from stillhouse.runs.sweep.processes import RunProcess, WorkerSlot, wait_for, wait_until_free, worker_slots
from stillhouse.runs.sweep.search import GridSearch, OptunaSearch, Search, validations
from stillhouse.runs.sweep.sharing import shared_texts_key

POLL = 0.5
"""Seconds between two looks at the logs of running runs."""
TO_THEIR_END = ("done", "stopped early")

logger = logging.getLogger("stillhouse")


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep has come to.

    Example: `SweepResult(folder=Path("runs/methods"), states={"kd-seed-1": "done", ...})`
    """

    folder: Path
    """Of the sweep: the runs, under `runs`, and the page that compares them."""
    states: dict[str, str]
    """Run -> "done", "stopped early", "failed", "interrupted" or "to do"."""
    refused: dict[str, dict[str, str]]
    """The combinations that the checks refused, where these are left out: name -> axis -> value."""

    def count(self, state: str) -> int:
        """How many runs stand so."""
        return sum(one == state for one in self.states.values())


def sweep(
    source: str | Path | Mapping[str, Any],
    *,
    workers: int = 1,
    **overrides: Any,
) -> SweepResult:
    """Run every combination that a sweep's YAML file or a dictionary says, each in a process of its own.

    Called again, it goes on: finished runs stay, interrupted ones are resumed, failed ones are tried again.
    The calling script needs `if __name__ == "__main__":` around it, as everything that starts processes does.

    Args:
        source: the YAML file of a sweep, or the same as a dictionary.
        workers: how many runs at the same time.
        **overrides: values that lie over those of the source: `skip_refused=True`, or of the run that all
            have in common `**{"run.train.max_steps": 100}`.

    Raises:
        StillhouseError: the sweep or one of its combinations is not as needed; nothing has started then.

    Example:
        >>> result = stillhouse.sweep("sweep.yaml", workers=2)
        >>> result.count("done")
    """
    return execute_sweep(SweepPlan(source, overrides), workers)


def execute_sweep(plan: SweepPlan, workers: int = 1) -> SweepResult:
    """Run a sweep whose file has been read."""
    with plan.folder.alone():
        for note in plan.notes():
            logger.warning(note)
        search, refused = _search(plan)
        try:
            stopped = _Sweep(plan, search, refused, worker_slots(workers)).run()
        finally:
            _write_report(plan.folder)
        if stopped is not None:
            raise stopped
        states = {name: plan.folder.state_of(name)[0] for name in plan.folder.lines}
        return SweepResult(plan.folder.path, dict(states), refused.names)


def checked_members(plan: SweepPlan) -> tuple[list[Member], Refusals]:
    """The runs of a grid, or of a search those with each value once, after every check.

    Raises:
        ConfigError: everything that is refused, unless the sweep leaves that out.
    """
    combinations = plan.grid() if plan.config.search.kind == "grid" else plan.each_value_once()
    members, refused = plan.members(combinations)
    if refused.names and (not members or not plan.config.skip_refused):
        raise ConfigError(*refused.lines(len(combinations)))
    return members, refused


def _search(plan: SweepPlan) -> tuple[Search, Refusals]:
    """Where the runs come from, after every check."""
    members, refused = checked_members(plan)
    before = plan.folder.read(tell=True)
    if plan.config.search.kind != "grid":
        refused = Refusals()
        plan.folder.start(plan.as_yaml(), _facts(plan, refused))
        return OptunaSearch(plan, refused), refused
    _check_unchanged(members)
    known = before["runs"]
    plan.folder.start(plan.as_yaml(), _facts(plan, refused))
    _tell_changes(plan.folder, known, members)
    finished = []
    for member in members:
        if plan.folder.state_of(member.name)[0] in TO_THEIR_END and not _changes(member):
            finished.append(member)
        plan.folder.note(member.name, **_line(member), state=plan.folder.state_of(member.name)[0])
    waiting = [member for member in members if member not in finished]
    return GridSearch(plan.config, waiting, finished), refused


def _facts(plan: SweepPlan, refused: Refusals) -> dict[str, Any]:
    return {
        "name": plan.config.name,
        "search": plan.config.search.kind,
        "axes": [*plan.axes, *plan.ranges],
        "refused": [{"name": name, "values": labels} for name, labels in refused.names.items()],
    }


def _line(member: Member) -> dict[str, Any]:
    return {"folder": f"runs/{member.name}", "values": member.labels}


def _tell_changes(folder: SweepFolder, known: Mapping[str, Any], members: Sequence[Member]) -> None:
    """Say which runs are new in a changed sweep, and which are no longer part of it."""
    names = [member.name for member in members]
    gone = [name for name in known if name not in names]
    if known and (new := [name for name in names if name not in known]):
        console.note(f"The sweep has changed: {len(new)} new runs ({_some(new)})")
    if gone:
        console.note(
            f"The sweep has changed: {len(gone)} runs are no longer part of it and stay as they are "
            f"({_some(gone)})"
        )
        for name in gone:
            del folder.lines[name]
        folder.write()


def _changes(member: Member) -> history.Changes:
    """The values that differ from those that a run had, but for what the sweep sets itself."""
    resolved = member.resolved
    before = RunFolder(default_folder(resolved.config)).facts("provenance.json")
    changes = history.changed_values(before, resolved.provenance)
    own = {path for path, fact in resolved.provenance.items() if fact["origin"] == OF_THE_SWEEP}
    return {path: pair for path, pair in changes.items() if path not in own}


def _check_unchanged(members: Sequence[Member]) -> None:
    """Refuse values that a run which has begun does not take over.

    Raises:
        ConfigError: for all such runs at once.
    """
    faults: list[Any] = []
    for member in members:
        folder = RunFolder(default_folder(member.resolved.config))
        try:
            history.check_changes(_changes(member), folder.path, folder.saved_state().get("state") == "done")
        except ConfigError as error:
            faults += [str(fault).replace("--resume: ", f"{member.name}: ") for fault in error.faults]
    if faults:
        raise ConfigError(*faults)


class _Sweep:
    """Starts runs while there are free places, and looks after those that run."""

    def __init__(self, plan: SweepPlan, search: Search, refused: Refusals, free: list[WorkerSlot]) -> None:
        self.plan, self.search, self.refused = plan, search, refused
        self.folder = plan.folder
        self._free = free
        self._active: dict[str, tuple[RunProcess, Member]] = {}
        self._early: set[str] = set()
        self._prepared: set[str] = set()
        self._stop: signals.Stopped | None = None

    def run(self) -> signals.Stopped | None:
        """Until every run has come to an end; the signal that has ended it before, if one has."""
        done = sum(line.get("state") in TO_THEIR_END for line in self.folder.lines.values())
        title = f"Sweep {self.plan.config.name}"
        with signals.handled(self._request), console.progress(title, self.search.total, done=done) as bar:
            try:
                while self._start_more() or self._active:
                    wait_for([worker for worker, _ in self._active.values()], POLL)
                    self._judge()
                    for name in [name for name, (worker, _) in self._active.items() if worker.ended]:
                        self._end(name)
                        bar.advance(1, **{"failed": self._failed()} if self._failed() else {})
            finally:
                for worker, _ in self._active.values():
                    worker.send(signal.SIGTERM)
        return self._stop

    def _request(self, number: int, _frame: FrameType | None) -> None:
        """The handler of signals: every run saves and stops, and no other starts."""
        self._stop = signals.Stopped(number)
        for worker, _ in self._active.values():
            worker.send(signal.Signals(number))

    def _start_more(self) -> bool:
        """Start what there is a place for; whether something was."""
        began = False
        while self._free and self._stop is None and (member := self.search.next()) is not None:
            place = self._free.pop(0)
            self.folder.note(member.name, **_line(member), state="running", message="")
            if not self._prepare(member, place):
                self._free.append(place)
                continue
            task = partial(run_member, member)
            self._active[member.name] = (RunProcess(task, self.folder.log(member.name), place), member)
            began = True
        return began

    def _prepare(self, member: Member, place: WorkerSlot) -> bool:
        """Have the teacher say what is known beforehand, once for all runs that ask the same."""
        key = shared_texts_key(member.resolved.config)
        if key is None or key in self._prepared:
            return True
        task = partial(fill_shared_cache, member)
        with console.phase(f"The teacher reads what {member.name} trains on"):
            worker = RunProcess(task, self.folder.log(member.name), place)
            self._active[member.name] = (worker, member)  # so that signals reach it
            while not worker.ended:
                wait_for([worker], POLL)
            del self._active[member.name]
        if self._stop is not None:
            self.folder.note(member.name, state="to do")
            return False
        if not worker.succeeded:
            self._failed_run(member, worker.failure())
            return False
        self._prepared.add(key)
        return True

    def _judge(self) -> None:
        """Stop runs that validation shows to be worse than others."""
        if self.plan.config.stop_early is None:
            return
        for name, (worker, member) in self._active.items():
            if name in self._early:
                continue
            rows = validations(member, metric_of(self.plan.config, member.resolved.config))
            if self.search.stops(member, rows):
                self._early.add(name)
                worker.send(signal.SIGTERM)
                self.folder.note(name, message=f"stopped early by its validation at step {rows[-1].step:,}")

    def _end(self, name: str) -> None:
        """Write down how a run has ended."""
        worker, member = self._active.pop(name)
        self._free.append(worker.place)
        state, message = self.folder.state_of(name)
        rows = validations(member, metric_of(self.plan.config, member.resolved.config))
        if state == "done":
            self.search.ended(member, rows, early=False)
            self.folder.note(name, state="done", message="")
            console.note(f"{name}: done")
        elif name in self._early and self._stop is None:
            self.search.ended(member, rows, early=True)
            self.folder.note(name, state="stopped early")
            console.note(f"{name}: {self.folder.lines[name]['message']}")
        elif self._stop is not None and not worker.crashed:
            self.folder.note(name, state="interrupted" if state == "interrupted" else "to do")
        else:
            self._failed_run(member, message if state == "failed" and message else worker.failure())

    def _failed_run(self, member: Member, message: str) -> None:
        first = message.splitlines()[0] if message else "for an unknown reason"
        self.folder.note(member.name, state="failed", message=message)
        console.warn(f"{member.name}: failed: {first} (log: {self.folder.log(member.name)})")

    def _failed(self) -> int:
        return sum(line.get("state") == "failed" for line in self.folder.lines.values())


def run_member(member: Member) -> None:
    """Start or resume a run of a sweep, in the process that is there for it.

    Raises:
        KeyboardInterrupt: a signal has stopped it.
        StillhouseError: it has failed.
    """
    from stillhouse.runs.execute import execute

    folder = RunFolder(default_folder(member.resolved.config))
    wait_until_free(folder.path)
    result = execute(member.resolved, resume=(folder.path / "state.json").exists())
    if result.signal is not None:
        raise signals.Stopped(result.signal)


def fill_shared_cache(member: Member) -> None:
    """Have the teacher of a run write and read the texts that are known before training."""
    from stillhouse.runs.teacher_cache import fill_cache

    wait_until_free(default_folder(member.resolved.config))
    console.note(fill_cache(member.resolved.config, only="main"))


def _write_report(folder: SweepFolder) -> None:
    """The page of all runs that have begun; nothing where none has."""
    from stillhouse.report import write_report

    try:
        write_report([folder.path], folder.report)
    except DataError:  # no run has begun
        return
    console.note(f"Report: {folder.report}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
