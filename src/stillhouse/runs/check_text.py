"""What `stillhouse check` prints: first what decides, then where it comes from; or all of it as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stillhouse import console
from stillhouse.console.format import MISSING, byte_size, compact_number, count, duration, is_number

if TYPE_CHECKING:
    from stillhouse.runs.measure import MeasuredCost, StepCost
    from stillhouse.runs.wall_time import Range

Row = tuple[str, str]


def print_summary(
    name: str, facts: Mapping[str, Any], time: Mapping[str, Any] | None, remedy: str, unknown: str
) -> None:
    """What decides whether a run is started: whether it fits, how long it takes, what it writes.

    Args:
        name: of the run.
        facts: its size.
        time: of the whole run, where it was measured.
        remedy: what to do if it does not fit.
        unknown: what is said of the time where it was not measured.
    """
    rows: list[Row] = [("fits", _fits(facts)), ("time", _time(time, unknown))]
    rows += _of_size(facts)
    if facts.get("fits") is False:
        rows.insert(1, ("to make it fit", remedy))
    console.print_table((name, "estimated"), rows)


def print_chain(stages: Mapping[str, Mapping[str, Any]], total: Mapping[str, Any], remedy: str) -> None:
    """A line for each stage, and one for all."""
    rows = []
    for name, stage in stages.items():
        facts = stage["size"]
        time = stage.get("time")
        told = "unknown" if time is None else _range(time["seconds"])
        rows.append((name, stage["does"], _short_fit(facts), told, *_steps_and_tokens(facts)))
    peak = total["memory_bytes"]["peak"]
    whole = (
        "all", "",
        MISSING if peak is None else byte_size(peak), _time(total["time"], "unknown"),
        str(total["steps"]), count(total["tokens_to_write"]),
    )  # fmt: skip
    notes = ["--measure trains two steps of each to find the time out."] if total["time"] is None else []
    notes.append("Tokens: at most. Stages run one after the other.")
    if total["unknown_memory"]:
        notes.append(f"Memory is unknown of {', '.join(total['unknown_memory'])}.")
    if total["fits"] is False:
        notes.append(f"To make it fit: {remedy}.")
    console.print_table(
        ("stage", "does", "memory", "time", "steps", "tokens to write"),
        [*rows, whole],
        note=" ".join(notes),
    )


def print_times(time: Mapping[str, Any]) -> None:
    """Each phase of the whole run."""
    processor = time["processor_phases"]
    rows = [(phase, _range(seconds), _range(processor[phase])) for phase, seconds in time["phases"].items()]
    console.print_table(
        ("phase", "time", "of the processor"),
        [*rows, ("all", _range(time["seconds"]), _range(time["processor_seconds"]))],
        title="Time by phase, from the two steps",
        note="From the shortest responses that the trained student may come to write to the longest.",
    )


def print_phases(memory: Mapping[str, Mapping[str, float]]) -> None:
    """What each phase takes of the memory of one device, and what of that is most."""
    most = max(sum(parts.values()) for parts in memory.values())
    rows = []
    for phase, parts in memory.items():
        told = [
            f"{name} {_in_gigabytes(size)}"
            for name, size in sorted(parts.items(), key=lambda part: -part[1])
            if size > 0.05 * most
        ]
        rows.append((phase, _in_gigabytes(sum(parts.values())), ", ".join(told)))
    console.print_table(("phase", "memory (GB)", "of which"), rows, title="Memory by phase, estimated")


def print_details(rows: Mapping[str, Any], title: str = "") -> None:
    """The rows of a size, with numbers to the digits that they have."""
    table = [(name, compact_number(value) if is_number(value) else value) for name, value in rows.items()]
    console.print_table(("quantity", "value"), table, title=title)


def print_comparison(taken: MeasuredCost, predicted: StepCost | None, memory: float | None) -> None:
    """What was predicted of two steps beside what they took.

    Args:
        taken: what they took.
        predicted: the time of the second one; None where no probe was possible.
        memory: the predicted peak in bytes; None where it was not estimated.
    """
    names = {"student": "student forward"}
    phases = {} if predicted is None else predicted.phases
    said = None if predicted is None else (predicted.seconds, predicted.processor)
    rows: list[tuple[str, float | None, float]] = [
        ("peak memory (GB)", memory and memory / 1e9, taken.peak_memory / 1e9),
        ("seconds a step", said and said[0], taken.step.seconds),
        ("seconds of the processor", said and said[1], taken.step.processor),
        *((names.get(one, one), phases.get(one), seconds) for one, seconds in taken.step.phases.items()),
    ]
    table = [
        (name, _digits(told), _digits(found), f"{told / found:.2f}" if told and found > 0.005 else None)
        for name, told, found in rows
    ]
    notes = (
        [] if predicted else ["Time is not predicted: models of this kind cannot be made with few layers."]
    )
    if taken.share_of_processor < 0.9:
        share = f"{taken.share_of_processor:.0%}"
        notes.append(
            f"The step had {share} of the processor that it asked for: other programs ran, and times by the "
            "clock say little. Those of the processor hold."
        )
    console.print_table(
        ("second of two steps", "predicted", "measured", "ratio"),
        table,
        title="Two steps, predicted and measured",
        note=" ".join(notes),
    )


def print_values(provenance: Mapping[str, Mapping[str, Any]], everything: bool, title: str = "") -> None:
    """Every value that was set, with its origin."""
    rows = [(path, _shown(fact["value"]), str(fact["origin"])) for path, fact in provenance.items()]
    chosen = [row for row in rows if row[2] != "default"]
    defaults = [row for row in rows if row[2] == "default"] if everything else []
    left_out = len(rows) - len(chosen) - len(defaults)
    note = f"{left_out} more values are defaults; --all shows them." if left_out else ""
    console.print_table(("value", "is", "from"), [*chosen, *defaults], title=title, note=note)


def time_facts(phases: Mapping[str, Range | None], processor: Mapping[str, Range | None]) -> dict[str, Any]:
    """Plain values of the time of a whole run, under names that stay.

    Args:
        phases: by the clock.
        processor: the same in seconds of the processor.
    """
    from stillhouse.runs.wall_time import whole

    return {
        "seconds": _ends(whole(phases)),
        "processor_seconds": _ends(whole(processor)),
        "unknown": [phase for phase, one in phases.items() if one is None],
        "phases": {phase: _ends(one) for phase, one in phases.items()},
        "processor_phases": {phase: _ends(one) for phase, one in processor.items()},
    }


def _ends(one: Range | None) -> list[float] | None:
    return None if one is None else [one.low, one.high]


def steps_facts(taken: MeasuredCost, predicted: StepCost | None, memory: float | None) -> dict[str, Any]:
    """Plain values of the comparison, under names that stay."""
    return {
        "predicted": {"memory_bytes": memory, **_cost(predicted)},
        "measured": {"memory_bytes": taken.peak_memory, **_cost(taken.step)},
        "share_of_processor": taken.share_of_processor,
    }


def chain_total(
    sizes: Mapping[str, Mapping[str, Any]], times: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, Any]:
    """All stages together: tokens and steps add up, and memory is that of the stage that takes most.

    Args:
        sizes: the facts of each stage.
        times: the time of each, None where it is not known; empty where nothing was measured.
    """
    writes = [one["tokens"] for size in sizes.values() for one in size.get("tokens_to_write", {}).values()]
    peaks = [size["memory_bytes"]["peak"] for size in sizes.values() if "memory_bytes" in size]
    fits = [size["fits"] for size in sizes.values() if "fits" in size]
    return {
        "tokens_to_write": sum(writes),
        "steps": sum(size.get("steps", 0) for size in sizes.values()),
        "memory_bytes": {"peak": max(peaks, default=None)},
        "unknown_memory": [name for name, size in sizes.items() if "memory_bytes" not in size],
        "fits": all(fits) if fits else None,
        "time": _chain_time(times) if times else None,
    }


def _chain_time(times: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """The times that are known together, and what they leave out. One process runs all: it starts once."""
    from stillhouse.runs.wall_time import STARTING

    known = {name: time for name, time in times.items() if time is not None}
    unknown = [name for name in times if name not in known]
    unknown += [f"{name}: {phase}" for name, time in known.items() for phase in time["unknown"]]
    starts = [time["phases"][STARTING][0] for time in known.values()]
    again = sum(starts) - max(starts, default=0.0)
    ends = [sum(time["seconds"][end] for time in known.values()) - again for end in (0, 1)]
    return {"seconds": ends, "unknown": unknown}


def _cost(cost: StepCost | None) -> dict[str, Any]:
    if cost is None:
        return {"seconds": None, "processor_seconds": None, "phases": {}}
    return {
        "seconds": cost.seconds, "processor_seconds": cost.processor, "phases": dict(cost.phases)
    }  # fmt: skip


def _fits(facts: Mapping[str, Any]) -> str:
    device, memory = facts["device"], facts["memory_bytes"]
    phases: Mapping[str, Mapping[str, float]] = memory["phases"]
    most = max(phases, key=lambda phase: sum(phases[phase].values()))
    over = f" over {device['shard_size']}" if "shard_size" in device else ""
    where = "" if device["count"] == 1 else f" on each of {device['count']} ({device['parallel']}{over})"
    told = f"{byte_size(memory['peak'])} of {byte_size(device['memory_bytes'])}, {device['name']}{where}"
    return f"{'yes' if facts['fits'] else 'NO'}: {told}; most in {most}"


def _short_fit(facts: Mapping[str, Any]) -> str:
    if "memory_bytes" not in facts:
        return "unknown"
    peak = byte_size(facts["memory_bytes"]["peak"])
    return peak if facts["fits"] else f"{peak}: does not fit"


def _steps_and_tokens(facts: Mapping[str, Any]) -> tuple[str, str]:
    tokens = sum(one["tokens"] for one in facts.get("tokens_to_write", {}).values())
    return str(facts.get("steps", MISSING)), count(tokens) if tokens else MISSING


def _time(time: Mapping[str, Any] | None, unknown: str) -> str:
    if time is None:
        return unknown
    unknown = f", without {', '.join(time['unknown'])} (unknown)" if time["unknown"] else ""
    return f"{_range(time['seconds'])}{unknown}"


def _range(seconds: Any) -> str:
    if seconds is None:
        return "unknown"
    low, high = (duration(one, tenths=True) for one in seconds)
    return low if low == high else f"{low} to {high}"


def _of_size(facts: Mapping[str, Any]) -> list[Row]:
    rows = []
    if writes := facts.get("tokens_to_write"):
        told = [f"{who} {count(one['tokens'])}" for who, one in writes.items()]
        rows.append(("tokens to write", f"{', '.join(told)}, at most"))
    if caches := facts.get("cache_bytes"):
        rows.append(
            ("cache on disk", ", ".join(f"{path} {byte_size(size)}" for path, size in caches.items()))
        )
    what = "pair" if "pairs" in facts else "prompt"
    counts = _counted(facts["steps"], "step"), _counted(facts[f"{what}s"], what)
    rows.append(("training", ", ".join(counts)))
    return rows


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _in_gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
