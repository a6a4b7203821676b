"""What may change when a run is resumed, and the record of which steps had which values.

A run is started once and resumed any number of times; each time is a segment in its state.json, with the step
that it went on from and the values that were others than before.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from stillhouse.console.format import setting_text
from stillhouse.core.distributed import rank_and_size
from stillhouse.errors import ConfigError, Fault

Changes = dict[str, list[Any]]
"""Setting -> [the value before, the value now]."""
State = dict[str, Any]

NOT_TRAINED_BY = (
    "data.token_cache", "data.workers", "evaluate.*", "output.*", "train.epochs", "train.keep_checkpoints",
    "train.log_every", "train.max_steps", "train.report_to", "train.save_every",
)  # fmt: skip
"""Settings of a finished run that may change: how long, how it is measured, what is kept and shown."""
PLACES = (
    "data.*path", "student.path", "student.tokenizer", "teacher*.adapter",
    "teacher*.path", "teacher*.tokenizer",
)  # fmt: skip
"""Where something is that may have moved: what is there is compared by its digest (`runs/inputs.py`)."""
CONNECTIONS = tuple(
    f"{part}.{name}"
    for part in ("engine", "teacher*")
    for name in ("url", "key_env", "concurrency", "retries", "timeout", "backoff")
)
TAKING_EFFECT = (
    "engine.batch_size", "engine.batch_tokens", "engine.gpu_memory_utilization",
    "engine.tensor_parallel_size",
    "student.gradient_checkpointing", "teacher*.cache", "teacher*.folder", "teacher*.limit", "train.clip",
    "train.compile_models", "train.fused.*", "train.lr", "train.micro_batch_size", "train.micro_batch_tokens",
    "train.packing", "train.precision",
    "train.schedule", "train.validate_every", "train.validate_rouge", "train.warmup", "train.weight_decay",
)  # fmt: skip
"""Settings of an unfinished run that may change besides: they hold from the step on that it goes on from."""


def changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The settings that differ between two `provenance.json`, each {"value": ..., "origin": ...}.

    A default that one of the two versions of Stillhouse does not know is no change.
    """
    now = json.loads(json.dumps(now, default=str))
    found: Changes = {}
    if not before:  # the disk was full before the first word on the values was written
        return found
    for path in dict.fromkeys((*before, *now)):
        old, new = before.get(path), now.get(path)
        if None in (old, new) and (old or new or {}).get("origin") == "default":
            continue
        values = [None if fact is None else fact.get("value") for fact in (old, new)]
        if values[0] != values[1]:
            found[path] = values
    return found


def check_changes(changes: Changes, folder: Path, finished: bool) -> None:
    """Refuse a resumption with values that would make the record of the run untrue.

    Raises:
        ConfigError: values changed that a run in this state does not take over.
    """
    allowed = NOT_TRAINED_BY if finished else (*NOT_TRAINED_BY, *TAKING_EFFECT)
    refused = [
        f"{path} ({setting_text(old)} -> {setting_text(new)})"
        for path, (old, new) in changes.items()
        if not _matches(path, (*allowed, *PLACES, *CONNECTIONS))
    ]
    if not refused:
        return
    shown = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if len(refused) > 5 else "")
    problem = "was finished with other values" if finished else "was started with other values"
    way_out = (
        f"Start a new run with them: name=NEW, or name=NEW --from {folder} to go on from its student."
        if finished
        else "Resume it with its own values, or start a new run: name=NEW."
    )
    raise ConfigError(
        Fault("--resume", f"{folder} {problem}", got=shown, allowed=", ".join(allowed), hint=way_out)
    )


def check_length(folder: Path, reached: int, steps: int) -> None:
    """Refuse to end a run before the step that it has reached.

    Raises:
        ConfigError: it has done more steps than it now should.
    """
    if reached > steps:
        raise ConfigError(
            Fault(
                "train.max_steps" if steps else "train.epochs",
                f"{folder} has done {reached:,} steps already",
                got=f"{steps:,} steps",
                allowed=f"{reached:,} or more",
                hint="A run can be made longer, not shorter.",
            )
        )


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def begun(
    saved: State, facts: Mapping[str, Any], from_step: int, changes: Changes, last_sign: float
) -> State:
    """The state of a run that starts or goes on now.

    Args:
        saved: what state.json holds; empty for a new run.
        facts: what else is recorded of the run.
        from_step: the step of the checkpoint that it goes on from.
        changes: the values that are others than in the segment before.
        last_sign: when the process before, if it was killed, last wrote (seconds since 1970).
    """
    segments = [_ended(one, last_sign) for one in saved.get("segments") or _only_segment(saved)]
    segment = {
        "from_step": from_step,
        "started": now(),
        "ended": None,
        "seconds": None,
        "processes": rank_and_size()[1],
        "changed": changes,
    }
    kept: State = {name: saved[name] for name in ("max_steps", "parent") if name in saved}
    return {
        "state": "running",
        **facts,
        "started": saved.get("started") or segment["started"],
        "ended": None,
        "seconds": None,
        "process": os.getpid(),
        "host": platform.node(),
        "message": None,
        **kept,
        "segments": [*segments, segment],
    }


def ended(state: State, how: str, message: str | None, seconds: float) -> State:
    """The state of a run whose newest segment has ended after so many seconds."""
    *before, last = state["segments"]
    last = {**last, "ended": now(), "seconds": round(seconds, 3)}
    took = sum(one["seconds"] or 0.0 for one in (*before, last))
    return {
        **state,
        "state": how,
        "ended": last["ended"],
        "seconds": round(took, 3),
        "message": message,
        "segments": [*before, last],
    }


def _only_segment(saved: State) -> list[State]:
    """The one segment of a run that was recorded before there were any."""
    if not saved.get("started"):
        return []
    times = {name: saved.get(name) for name in ("started", "ended", "seconds")}
    return [{"from_step": 0, **times, "processes": 1, "changed": {}}]


def _ended(segment: State, last_sign: float) -> State:
    """A segment with its length; that of a killed process counts up to its last sign of life."""
    if segment.get("seconds") is not None:
        return segment
    began = datetime.datetime.fromisoformat(segment["started"]).timestamp()
    return {**segment, "seconds": round(max(0.0, last_sign - began), 3)}


def now() -> str:
    """The time, as state.json has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
