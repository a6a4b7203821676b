"""What each prompt contributed to a result, and how sure results and their differences are for it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from stillhouse.console.format import is_number
from stillhouse.report.metrics import interval, metric_info
from stillhouse.report.statistics import (
    LEVEL,
    Floats,
    bootstrap_interval,
    fewest_prompts,
    resampled,
    student_t,
    wilson_interval,
)

PromptSums = dict[str, tuple[float, float]]
"""Total and weight by the prompt's id: the measure is the sum of the totals over that of the weights."""

FIELDS = {"mean_length": "tokens", "finished": "finished"}
"""Measures whose values stand under another name in the rows."""


def prompt_sums(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, PromptSums]:
    """What each prompt contributed to each measure that the rows account for.

    A row gives a score under the measure's name, or `sums: {NAME: [total, weight]}` where the measure is a
    mean over tokens. Measures that the rows do not add up to, such as BLEU, are left out.
    """
    found: dict[str, PromptSums] = {}
    for name, value in metrics.items():
        if is_number(value) and math.isfinite(value):
            k = re.fullmatch(r"pass_at_(\d+)", name)
            sums = _pass_at_k(rows, int(k[1])) if k else _added_up(rows, name)
            weight = sum(weight for _, weight in sums.values())
            if weight > 0:
                mean = sum(total for total, _ in sums.values()) / weight
                # Scores are stored to four digits.
                if math.isclose(mean, value, rel_tol=1e-3, abs_tol=1e-3):
                    found[name] = sums
    return found


def _added_up(rows: Sequence[Mapping[str, Any]], name: str) -> PromptSums:
    sums: PromptSums = {}
    field = FIELDS.get(name, name)
    for row in rows:
        value, of_tokens = row.get(field), row.get("sums")
        pair = of_tokens.get(name) if isinstance(of_tokens, dict) else None
        if isinstance(value, bool | int | float):
            pair = (float(value), 1.0)
        if isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_finite, pair)):
            total, weight = sums.get(str(row.get("id")), (0.0, 0.0))
            sums[str(row.get("id"))] = (total + pair[0], weight + pair[1])
    return sums


def _pass_at_k(rows: Sequence[Mapping[str, Any]], k: int) -> PromptSums:
    passed = _added_up(rows, "passed")
    counts = {id: (round(count), round(right)) for id, (right, count) in passed.items() if count >= k}
    return {id: (1 - math.comb(n - c, k) / math.comb(n, k), 1.0) for id, (n, c) in counts.items()}


def _finite(value: Any) -> TypeGuard[float]:
    return is_number(value) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class ResultScores:
    """A system's scores by prompt, and its measures on prompts drawn again: the same draws for all systems on
    a task."""

    by_prompt: Mapping[str, Mapping[str, float]]
    """Measure -> id of the prompt -> score."""
    resampled: Mapping[str, Floats]
    """Measure -> [resamples] values."""


NO_SCORES = ResultScores({}, {})


def resample_all(results: Sequence[Mapping[str, PromptSums]]) -> list[ResultScores]:
    """The scores of all systems on one task.

    Args:
        results: what `prompt_sums` gave for each.
    """
    ids = dict.fromkeys(id for result in results for sums in result.values() for id in sums)
    place = {id: number for number, id in enumerate(ids)}
    columns = [(index, name) for index, result in enumerate(results) for name in result]
    if not columns:
        return [NO_SCORES for _ in results]
    both = np.zeros((2, len(place), len(columns)))
    for column, (index, name) in enumerate(columns):
        sums = results[index][name]
        both[:, [place[id] for id in sums], column] = np.array(list(sums.values())).T
    drawn = resampled(both[0], both[1])
    values: list[dict[str, Floats]] = [{} for _ in results]
    for column, (index, name) in enumerate(columns):
        values[index][name] = drawn[:, column]
    by_prompt = [
        {
            name: {id: total / weight for id, (total, weight) in sums.items() if weight}
            for name, sums in result.items()
        }
        for result in results
    ]
    return [ResultScores(scores, drawn) for scores, drawn in zip(by_prompt, values, strict=True)]


def mean_scores(scores: Sequence[ResultScores]) -> ResultScores:
    """Of several training seeds: the measures that all of them have, by the prompts that all of them have."""
    names = [name for name in scores[0].resampled if all(name in one.resampled for one in scores)]
    by_prompt = {}
    for name in names:
        own = [one.by_prompt[name] for one in scores]
        shared = [id for id in own[0] if all(id in values for values in own)]
        by_prompt[name] = {id: sum(values[id] for values in own) / len(own) for id in shared}
    means = {name: np.mean([one.resampled[name] for one in scores], axis=0) for name in names}
    return ResultScores(by_prompt, means)


def confidence_interval(
    metrics: Mapping[str, Any], scores: ResultScores, name: str, runs: int = 1
) -> tuple[float, float] | None:
    """The 95 % interval of a measure: over prompts and, for several runs that differ in the seed, over these.

    The two are independent, so their reaches add up in squares. None where nothing is known.
    """
    value = metrics.get(name)
    if not _finite(value):
        return None
    if runs == 1 and (given := _given_interval(metrics, name)):
        return given
    around = _over_prompts(scores, name)
    seeds = _over_seeds([(metrics.get(f"{name}_std"), runs)], LEVEL)
    if around is None and not seeds:
        return None
    low, high = around or (value, value)
    low, high = value - math.hypot(value - low, seeds), value + math.hypot(high - value, seeds)
    if metric_info(name).style == "share":  # which Student's t over two or three seeds does not know
        return max(low, 0.0), min(high, 1.0)
    return low, high


def intervals(
    metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each measure of one system that the rows account for."""
    (scores,) = resample_all([prompt_sums(metrics, rows)])
    found = {name: confidence_interval(metrics, scores, name) for name in metrics}
    return {name: ends for name, ends in found.items() if ends is not None}


def _given_interval(metrics: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """What the task itself says: an interval, or a standard error over its questions."""
    if _finite(metrics.get(f"{name}_low")) and _finite(metrics.get(f"{name}_high")):
        return interval(dict(metrics), name)
    error = metrics.get(f"{name}_se")
    if not _finite(error):
        return None
    reach = student_t(0.5 + LEVEL / 2, math.inf) * error
    return metrics[name] - reach, metrics[name] + reach


def _over_prompts(scores: ResultScores, name: str) -> tuple[float, float] | None:
    values = scores.resampled.get(name)
    if values is None:
        return None
    own = set(scores.by_prompt[name].values())
    if own in ({0.0}, {1.0}) and metric_info(name).style == "share":
        return wilson_interval(own.pop(), len(scores.by_prompt[name]))  # where drawing again changes nothing
    return bootstrap_interval(values, len(scores.by_prompt[name]))


def _over_seeds(deviations: Sequence[tuple[Any, int]], level: float) -> float:
    """How far the difference (or a single mean) reaches for the training seeds, by Welch's t; 0 where no side
    has several.

    Args:
        deviations: standard deviation over the runs and their number, of each side.
        level: the confidence.
    """
    errors = [
        (deviation**2 / runs, runs) for deviation, runs in deviations if runs > 1 and _finite(deviation)
    ]
    variance = sum(error for error, _ in errors)
    if not variance:
        return 0.0
    freedom = variance**2 / sum(error**2 / (runs - 1) for error, runs in errors)
    return student_t(0.5 + level / 2, freedom) * math.sqrt(variance)


@dataclass(frozen=True, slots=True)
class MeasuredDifference:
    """The difference of two systems with its interval. Example: `MeasuredDifference(-1.2, -2.0, -0.4)`"""

    value: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Measured:
    """A measure of one system, as `measured_difference` takes it."""

    value: float
    interval: tuple[float, float] | None
    scores: ResultScores
    std: float | None
    """Standard deviation over runs that differ in the seed."""
    runs: int


def measured_difference(
    name: str, one: Measured, other: Measured, comparisons: int = 1
) -> MeasuredDifference | None:
    """One system against another on the same prompts: a paired bootstrap, and Welch's t over training seeds.

    Args:
        name: the measure.
        one: its value and scores.
        other: those of the other.
        comparisons: how many such differences are looked at together (Bonferroni).

    Returns:
        None where nothing is known about how sure the two are.
    """
    level = 1 - (1 - LEVEL) / max(1, comparisons)
    value = one.value - other.value
    seeds = _over_seeds([(one.std, one.runs), (other.std, other.runs)], level)
    ours, theirs = one.scores.resampled.get(name), other.scores.resampled.get(name)
    if ours is not None and theirs is not None:
        prompts = len(one.scores.by_prompt[name].keys() & other.scores.by_prompt[name].keys())
        around = bootstrap_interval(ours - theirs, prompts, level)
        if around is None or prompts < fewest_prompts(comparisons):
            return None
        low, high = math.hypot(value - around[0], seeds), math.hypot(around[1] - value, seeds)
        return MeasuredDifference(value, value - low, value + high)
    if one.interval is None or other.interval is None:
        return None
    wider = student_t(0.5 + level / 2, math.inf) / student_t(0.5 + LEVEL / 2, math.inf)
    (a, b), (c, d) = one.interval, other.interval
    low, high = math.hypot(one.value - a, d - other.value), math.hypot(b - one.value, other.value - c)
    return MeasuredDifference(value, value - wider * low, value + wider * high)
