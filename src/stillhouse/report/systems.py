"""The systems that a set of runs has evaluated: teacher, student before, students after; shared ones once.

And whether their results may be compared: on the same questions, with the same sampling, seeds and limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.console.format import is_number, setting_text
from stillhouse.report.metrics import metric_info
from stillhouse.report.record import Evaluation, RunRecord, leaves

SystemRole = Literal["teacher", "before", "after"]
ROLES: tuple[SystemRole, ...] = ("teacher", "before", "after")


@dataclass(frozen=True, slots=True)
class System:
    """One evaluated system on one task.

    Example: `System("student after kd", "after", "e2e", run=0, metrics={"rouge_l": 57.1}, ...)`
    """

    label: str
    role: SystemRole
    task: str
    run: int | None
    """Index of the run it belongs to; None where all runs share it."""
    metrics: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def colour(self) -> str:
        """The CSS variable that paints it everywhere on the page."""
        return run_colour(self.run or 0) if self.role == "after" else f"--{self.role}"


def run_colour(run: int) -> str:
    """The CSS variable of a run; eight of them, then from the start."""
    return f"--run-{run % 8}"


def gather(runs: Sequence[RunRecord]) -> list[System]:
    """All systems of all runs, by task, then teacher, student before, students after.

    The teacher and the student before are one system where every run measured the same quality on the same
    task, and one system for each run otherwise.
    """
    tasks = list(dict.fromkeys(result.task for run in runs for result in run.evaluations))
    systems: list[System] = []
    for task in tasks:
        for role in ROLES:
            found = [
                (index, result)
                for index, run in enumerate(runs)
                for result in run.evaluations
                if result.task == task and role_of(result.system) == role
            ]
            systems += _shared(found, role) or [_system(index, result, role, runs) for index, result in found]
    return systems


def role_of(system: str) -> SystemRole:
    """The role that a system's name tells; what is neither teacher nor before counts as after."""
    words = system.lower().replace("-", " ").replace("_", " ").split()
    if words[:1] == ["teacher"]:
        return "teacher"
    return "before" if "before" in words else "after"


def baseline(systems: Sequence[System], system: System) -> System | None:
    """The student before training that `system` is to be compared with."""
    return _of_role(systems, system, "before")


def teacher_of(systems: Sequence[System], system: System) -> System | None:
    """The teacher that `system` is to be compared with."""
    return _of_role(systems, system, "teacher")


def _of_role(systems: Sequence[System], system: System, role: SystemRole) -> System | None:
    fitting = (
        other
        for other in systems
        if other.role == role and other.task == system.task and other.run in (None, system.run)
    )
    return next(fitting, None)


def _shared(found: list[tuple[int, Evaluation]], role: SystemRole) -> list[System]:
    """One system for all, if the results are the same one measured again; nothing otherwise."""
    if role == "after" or not found:
        return []
    first = found[0][1]
    one_a_run = len({index for index, _ in found}) == len(found)
    if not one_a_run or not all(_same_quality(first, other) for _, other in found[1:]):
        return []
    fullest = max((result for _, result in found), key=lambda result: len(result.rows))
    return [System(first.label, role, first.task, None, first.metrics, first.settings, fullest.rows)]


def _same_quality(one: Evaluation, other: Evaluation) -> bool:
    """Equal in all but speed, which no two measurements share."""
    names = {
        name
        for name in one.metrics.keys() & other.metrics.keys()
        if metric_info(name).kind != "speed" and is_number(one.metrics[name])
    }
    return bool(names) and all(
        is_number(other.metrics[name]) and math.isclose(one.metrics[name], other.metrics[name], rel_tol=1e-6)
        for name in names
    )


def _system(index: int, result: Evaluation, role: SystemRole, runs: Sequence[RunRecord]) -> System:
    label = result.label
    if len(runs) > 1:
        same = [
            run
            for run in runs
            for other in run.evaluations
            if other.label == label and other.task == result.task
        ]
        name = runs[index].name
        if len(same) > 1 and name not in label:
            label = f"{label} · {name}"
    return System(label, role, result.task, index, result.metrics, result.settings, result.rows)


OF_THE_MODEL = ("template", "dtype")
"""Settings that belong to a model rather than to the measurement, such as a teacher's own template."""
IRRELEVANT = (
    "answers", "data", "dropped", "truncated", "dtype", "server", "requests_of_the_last_call",
    "retries_of_the_last_call", "questions_in_one_only",
)  # fmt: skip
"""Settings that may differ between results that are compared: where the rows are from (`questions_digest`
stands for what they say), what a tokenizer made too long, what a call of a server took."""


def differing_settings(one: System, other: System, but: Sequence[str] = ()) -> list[str]:
    """The settings of the measurement in which two results differ, of those that both have.

    Args:
        one: a system on a task.
        other: another one on the same task.
        but: settings that may differ.
    """
    ours, theirs = dict(leaves(one.settings)), dict(leaves(other.settings))
    return [
        name
        for name in ours
        if name in theirs
        and ours[name] != theirs[name]
        and not {name, name.partition(".")[0]} & {*IRRELEVANT, *but}
    ]


def measured_differently(systems: Sequence[System]) -> list[str]:
    """In what the results on one task were not measured alike, one text for each setting.

    Example: `["sampling.temperature 0 (kd), 1 (gkd, sft)", "other questions or references"]`
    """
    names = dict.fromkeys(
        name
        for index, one in enumerate(systems)
        for other in systems[index + 1 :]
        for name in differing_settings(
            one, other, OF_THE_MODEL if "teacher" in (one.role, other.role) else ()
        )
    )
    texts = []
    for name in names:
        if name == "questions_digest":
            texts += [] if "prompts" in names else ["other questions or references"]
            continue
        groups: dict[str, list[str]] = {}
        for system in systems:
            found = dict(leaves(system.settings))
            if name in found:
                groups.setdefault(setting_text(found[name]), []).append(system.label)
        values = ", ".join(f"{value} ({', '.join(who)})" for value, who in groups.items())
        texts.append(f"{name.replace('_', ' ')} {values}")
    return texts
