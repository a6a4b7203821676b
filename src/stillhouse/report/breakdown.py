"""Where seconds and tokens went, and which source the responses come from, as bars and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.console.format import MISSING, byte_size, count, duration, is_number
from stillhouse.report.configuration import short_path
from stillhouse.report.record import RunRecord

SOURCE_COLOURS = {
    "fixed": "--part-0",
    "teacher": "--teacher",
    "student": "--part-1",
    "text": "--before",
    "chosen": "--part-2",
    "rejected": "--part-5",
}
PHASE_COLOURS = {
    "generate": "--part-2",
    "teacher": "--teacher",
    "student": "--part-1",
    "backward": "--part-5",
    "optimiser": "--part-3",
    "evaluate": "--part-0",
    "other": "--before",
}
PHASES = {
    "generate": "generating responses",
    "teacher": "the teacher's forward pass",
    "batch_statistics": "the student's forward pass for the statistics of a step",
    "student": "the student's forward pass and the loss",
    "backward": "the backward pass",
    "optimiser": "the optimiser",
    "evaluate": "validation",
    "other": "loading, final evaluation, saving",
}


@dataclass(frozen=True, slots=True)
class BarSegment:
    """One segment of a bar: a label, a CSS variable, a share of the whole, and what to write."""

    label: str
    colour: str
    share: float
    text: str


@dataclass(frozen=True, slots=True)
class StackedBar:
    """A whole cut into segments, for one run."""

    label: str
    total: str
    segments: tuple[BarSegment, ...]


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """What one phase of a run took. Example: `PhaseRow("generate", "generating responses", "34 s", ...)`"""

    name: str
    about: str
    seconds: str
    share: str
    tokens: str
    rate: str


def source_bars(runs: Sequence[RunRecord]) -> list[StackedBar]:
    """The mean share of each source, one bar a run."""
    bars = []
    for run in runs:
        rows = run.metrics("train")
        means: dict[str, float] = {}
        for name in SOURCE_COLOURS:
            values = [row[key] for row in rows if is_number(row.get(key := f"responses/{name}"))]
            values = [value for value in values if math.isfinite(value)]
            if values:
                means[name] = sum(values) / len(values)
        total = sum(means.values())
        if total > 0:
            segments = [
                BarSegment(name, SOURCE_COLOURS[name], mean / total, f"{mean / total:.0%}")
                for name, mean in means.items()
                if mean > 0
            ]
            bars.append(StackedBar(run.name, "", tuple(segments)))
    return bars


def time_bars(runs: Sequence[RunRecord]) -> list[StackedBar]:
    """Where the seconds went, one bar a run; what no phase accounts for is "other"."""
    bars = []
    for run in runs:
        spent = seconds_by_phase(run)
        total = sum(spent.values())
        if total <= 0:
            continue
        segments = [
            BarSegment(
                name, PHASE_COLOURS.get(name, "--part-4"), seconds / total, duration(seconds, tenths=True)
            )
            for name, seconds in spent.items()
            if seconds >= 0.05  # would read as 0.0 s
        ]
        bars.append(StackedBar(run.name, duration(total, tenths=True), tuple(segments)))
    return bars


def phase_tables(runs: Sequence[RunRecord]) -> list[tuple[str, list[PhaseRow]]]:
    """Seconds and tokens of every phase, one table a run."""
    tables = []
    for run in runs:
        spent, tokens = seconds_by_phase(run), _sums(run, "tokens/")
        total = sum(spent.values())
        if total <= 0:
            continue
        rows = [
            _phase_row(name, spent.get(name), tokens.get(name), total) for name in _ordered(spent | tokens)
        ]
        tables.append((run.name, rows))
    return tables


def _phase_row(name: str, seconds: float | None, tokens: float | None, total: float) -> PhaseRow:
    rated = tokens and seconds and seconds >= 0.005
    return PhaseRow(
        name,
        PHASES.get(name, ""),
        duration(seconds, tenths=True),
        MISSING if seconds is None else f"{seconds / total:.1%}",
        MISSING if not tokens else count(round(tokens)),
        count(round(tokens / seconds)) if rated and tokens and seconds else MISSING,
    )


def seconds_by_phase(run: RunRecord) -> dict[str, float]:
    """Seconds of each phase of the training, and "other" up to what the whole run took."""
    spent = _sums(run, "seconds/")
    whole = run.state.get("seconds")
    if spent and is_number(whole) and math.isfinite(whole) and whole > sum(spent.values()):
        spent["other"] = spent.get("other", 0.0) + whole - sum(spent.values())
    return {name: spent[name] for name in _ordered(spent)}


def _ordered(names: dict[str, float]) -> list[str]:
    order = {name: index for index, name in enumerate(PHASE_COLOURS)}
    return sorted(names, key=lambda name: order.get(name, len(order) - 2))


def _sums(run: RunRecord, prefix: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for row in run.log:
        for key, value in row.items():
            if key.startswith(prefix) and is_number(value) and math.isfinite(value):
                name = key.removeprefix(prefix)
                sums[name] = sums.get(name, 0.0) + value
    return sums


MEMORY = {"peak": "at most", "allocated": "between steps", "reserved": "held by torch"}
"""What a log says about the memory of a GPU -> how it is told."""


def device_memory_told(run: RunRecord) -> str:
    """How much of the GPU's memory training took; empty on a CPU."""
    rows = run.metrics("train")
    largest = {
        name: max((row[key] for row in rows if is_number(row.get(key := f"memory/{name}"))), default=0.0)
        for name in MEMORY
    }
    return ", ".join(f"{byte_size(size)} {MEMORY[name]}" for name, size in largest.items() if size)


GENERATED = ("responses/teacher", "responses/student")
"""Shares of the responses of a step that a model generated; the others are rows of the data."""


def generated_tokens(run: RunRecord) -> str:
    """How many tokens were generated, and about how often each was trained on; empty where none was."""
    generated = _sums(run, "tokens/").get("generate", 0.0)
    trained = sum(
        row["tokens"] * share
        for row in run.metrics("train")
        for share in (row.get(name) for name in GENERATED)
        if is_number(row.get("tokens")) and is_number(share) and math.isfinite(share)
    )
    if not generated or not trained:
        return ""
    times = f"{trained / generated:.2g}"
    return f"{count(round(generated))} tokens; trained on about {times} times each"


@dataclass(frozen=True, slots=True)
class TeachingRow:
    """What one of several teachers taught. Example: `TeachingRow("code", "coder-7b, cache", "120", ...)`"""

    name: str
    about: str
    """Its model and kind."""
    rows: str
    """Of the data set that name it."""
    responses: str
    tokens: str
    loss: str
    """Of its tokens, in the first and in the last row of the log (nats)."""


def teaching_tables(runs: Sequence[RunRecord]) -> list[tuple[str, list[TeachingRow]]]:
    """Which teacher taught what, one table for each run with several."""
    tables = []
    for run in runs:
        log = run.metrics("train")
        names = sorted({key.split("/")[1] for row in log for key in row if key.startswith("teachers/")})
        if names:
            tables.append((run.name, [_taught(run, name) for name in names]))
    return tables


def _taught(run: RunRecord, name: str) -> TeachingRow:
    log, place = run.metrics("train"), "teacher" if name == "main" else f"teachers.{name}"
    sums = {
        what: sum(row[key] for row in log if is_number(row.get(key := f"teachers/{name}/{what}")))
        for what in ("responses", "tokens")
    }
    losses = [row[key] for row in log if is_number(row.get(key := f"teachers/{name}/loss"))]
    settings = {key: run.config.get(f"{place}.{key}") for key in ("of.path", "path", "url", "kind")}
    known = [str(entry.value) for entry in settings.values() if entry is not None and entry.value]
    data = next((one for one in run.data if one.get("name") == "train"), {})
    named = data.get("teachers", {})
    return TeachingRow(
        name,
        ", ".join(short_path(one) for one in known),
        count(named[name]) if is_number(named.get(name)) else MISSING,
        count(sums["responses"]),
        count(sums["tokens"]),
        f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else MISSING,
    )
