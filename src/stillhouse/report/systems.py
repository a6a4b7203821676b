"""The systems that a set of runs has evaluated: teacher, student before, students after.

Shared ones are one system, and so are runs that differ in the seed alone. And whether
their results may be compared: on the same questions, with the same sampling, seeds and limits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from stillhouse.console.format import is_number, setting_text
from stillhouse.report.metrics import MEASURED_BY, MetricInfo, metric_info
from stillhouse.report.record import Evaluation, RunRecord, leaves
from stillhouse.report.scores import (
    NO_SCORES,
    Measured,
    MeasuredDifference,
    ResultScores,
    confidence_interval,
    mean_scores,
    measured_difference,
    prompt_sums,
    resample_all,
)
from stillhouse.report.seeds import group_of_each, name_of_seeds, seed_groups

SystemRole = Literal["teacher", "before", "after"]
ROLES: tuple[SystemRole, ...] = ("teacher", "before", "after")
ROLE_COLOURS = {"teacher": "--teacher", "before": "--before"}
"""The CSS variables of systems that are not the end of a run."""


@dataclass(frozen=True, slots=True)
class System:
    """One evaluated system on one task.

    Example: `System("student after kd", "after", "e2e", run=0, metrics={"rouge_l": 57.1}, ...)`
    """

    label: str
    role: SystemRole
    task: str
    run: int | None
    """Index of the run it belongs to, of the first one of several seeds; None where all runs share it."""
    metrics: dict[str, Any]
    """Of several seeds the means, with the standard deviation over them as NAME_std. `NAME_low` and
    `NAME_high` are the ends of the 95 % interval."""
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    scores: ResultScores = NO_SCORES
    members: tuple[System, ...] = ()
    """The systems of the single seeds, if it stands for several."""
    colour: str = ""
    """The CSS variable that paints it everywhere on the page."""

    @property
    def who(self) -> tuple[str, int | None, str]:
        """What it is called on every task."""
        return self.role, self.run, self.label

    @property
    def prompts(self) -> int | None:
        """The sample size: on how many prompts it was measured; None where nobody says."""
        counts = [self.settings.get("prompts"), self.metrics.get("rows"), self.metrics.get("pairs")]
        counts += [len(scores) for scores in self.scores.by_prompt.values()]
        return next((int(count) for count in counts if is_number(count) and math.isfinite(count)), None)

    def measured(self, metric: MetricInfo) -> Measured:
        """One measure with what is known of its certainty."""
        low, high, std = (self.metrics.get(f"{metric.name}{end}") for end in ("_low", "_high", "_std"))
        interval = (float(low), float(high)) if is_number(low) and is_number(high) else None
        return Measured(self.metrics[metric.name], interval, self.scores, std, max(1, len(self.members)))


def difference(
    metric: MetricInfo, one: System, other: System, comparisons: int = 1
) -> MeasuredDifference | None:
    """How far two systems on one task are apart; None where nobody knows how sure that is."""
    if not (is_number(one.metrics.get(metric.name)) and is_number(other.metrics.get(metric.name))):
        return None
    return measured_difference(metric.name, one.measured(metric), other.measured(metric), comparisons)


def run_colour(group: int) -> str:
    """The CSS variable of a run, or of runs that differ in the seed alone: eight colours, then the same with
    dashed lines, then from the start."""
    return f"--run-{group % 16}"


def run_colours(runs: Sequence[RunRecord]) -> list[str]:
    """The CSS variable of each run."""
    return [run_colour(group) for group in group_of_each(runs)]


def gather(runs: Sequence[RunRecord]) -> list[System]:
    """All systems of all runs, by task, then teacher, student before, students after.

    The teacher and the student before are one system where every run measured the same quality on the same
    task; runs that differ in the seed alone are one system; any other is one for each run.
    """
    tasks = list(dict.fromkeys(result.task for run in runs for result in run.evaluations))
    groups = seed_groups(runs)
    systems: list[System] = []
    for task in tasks:
        here: list[System] = []
        for role in ROLES:
            found = [
                (index, result)
                for index, run in enumerate(runs)
                for result in run.evaluations
                if result.task == task and role_of(result.system) == role
            ]
            here += _shared(found, role) or _grouped(found, role, runs, groups)
        systems += _with_intervals(_told_apart_by_folder(here, runs))
    return systems


def role_of(system: str) -> SystemRole:
    """The role that a system's name tells: the teacher, the student before, or else the student after."""
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
    metrics = _shown(first)
    return [
        System(
            first.label,
            role,
            first.task,
            None,
            metrics,
            first.settings,
            fullest.rows,
            colour=ROLE_COLOURS[role],
        )
    ]


def _shown(result: Evaluation) -> dict[str, Any]:
    """The metrics without speeds that were not measured for their own sake: what else the machine did
    meanwhile is not known."""
    kind = result.settings.get("kind")
    return {name: value for name, value in result.metrics.items() if kind in MEASURED_BY.get(name, (kind,))}


def _grouped(
    found: list[tuple[int, Evaluation]],
    role: SystemRole,
    runs: Sequence[RunRecord],
    groups: Sequence[Sequence[int]],
) -> list[System]:
    """One system for the runs of a group, if these were measured alike."""
    systems = []
    for number, group in enumerate(groups):
        colour = ROLE_COLOURS.get(role) or run_colour(number)
        own = [
            _system(index, result, role, colour, runs, seeds=len(group))
            for index, result in found
            if index in group
        ]
        several = len(own) == len(group) > 1
        if several and not any(differing_settings(own[0], other) for other in own[1:]):
            systems.append(_mean_system(own, runs))
        else:
            systems += own
    return systems


def _mean_system(members: list[System], runs: Sequence[RunRecord]) -> System:
    names = [runs[member.run or 0].name for member in members]
    label = name_of_seeds([member.label for member in members])
    first = members[0]
    metrics = _means([member.metrics for member in members])
    rows = [{**row, "run": name} for name, member in zip(names, members, strict=True) for row in member.rows]
    return replace(first, label=label, metrics=metrics, rows=rows, members=tuple(members))


def _means(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of what is a number in all, with the standard deviation; of curves, point by point."""
    metrics: dict[str, Any] = {}
    for name, value in found[0].items():
        values = [one.get(name) for one in found]
        numbers = [value for value in values if is_number(value)]
        if name.endswith(("_std", "_se", "_low", "_high")):
            continue
        if len(numbers) == len(values):
            metrics[name] = statistics.fmean(numbers)
            metrics[f"{name}_std"] = statistics.stdev(numbers)
        elif isinstance(value, list) and all(
            isinstance(one, list) and len(one) == len(value) for one in values
        ):
            points = [point for point in zip(*values, strict=True) if all(isinstance(p, dict) for p in point)]
            metrics[name] = [_means(point) for point in points]
    return metrics


def _told_apart_by_folder(systems: Sequence[System], runs: Sequence[RunRecord]) -> list[System]:
    """The systems of one task, those of one label with the folder of their run behind it."""
    names = [(system.role, system.label) for system in systems]
    return [
        replace(system, label=f"{system.label} · {runs[system.run].folder.name}")
        if names.count((system.role, system.label)) > 1 and system.run is not None
        else system
        for system in systems
    ]


def _with_intervals(systems: Sequence[System]) -> list[System]:
    """The systems on one task with their scores by prompt, and each measure with its interval."""
    single = [one for system in systems for one in system.members or (system,)]
    sums = [prompt_sums(one.metrics, one.rows) for one in single]
    by_id = {id(one): scores for one, scores in zip(single, resample_all(sums), strict=True)}
    found = []
    for system in systems:
        parts = [by_id[id(one)] for one in system.members or (system,)]
        scores = mean_scores(parts) if system.members else parts[0]
        metrics = dict(system.metrics)
        for name, value in system.metrics.items():
            if is_number(value):
                reach = confidence_interval(system.metrics, scores, name, max(1, len(parts)))
                metrics |= {f"{name}_low": reach[0], f"{name}_high": reach[1]} if reach else {}
        found.append(replace(system, metrics=metrics, scores=scores))
    return found


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


def _system(
    index: int,
    result: Evaluation,
    role: SystemRole,
    colour: str,
    runs: Sequence[RunRecord],
    seeds: int,
) -> System:
    label = result.label
    if len(runs) > seeds:
        same = [
            run
            for run in runs
            for other in run.evaluations
            if other.label == label and other.task == result.task
        ]
        name = runs[index].name
        if len(same) > 1 and name not in label:
            label = f"{label} · {name}"
    metrics, settings = _shown(result), result.settings
    return System(label, role, result.task, index, metrics, settings, result.rows, colour=colour)


OF_THE_MODEL = ("template", "dtype")
"""Settings that belong to a model rather than to the measurement, such as a teacher's own template."""
IRRELEVANT = (
    "answers", "data", "rows", "sha256", "dropped", "truncated", "dtype", "server",
    "requests_of_the_last_call", "retries_of_the_last_call", "questions_in_one_only",
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
