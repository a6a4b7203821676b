"""Which steps of a run had which values, and which run its student came from."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from stillhouse.console.format import setting_text

Since = tuple[int, Any]
"""(the last step before it, value): the value holds from the step behind that one on."""


def sound(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state.json without what no run writes into it: values that are damaged, or of another program."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "name": str, "state": str, "started": str, "message": str, "host": str, "parent": dict,
        "max_steps": int, "process": int, "seconds": (int, float),
    }  # fmt: skip
    found = {
        name: one for name, one in saved.items() if one is None or isinstance(one, kinds.get(name, object))
    }
    if "segments" in found:
        segments = found["segments"]
        found["segments"] = (
            [one for one in segments if _is_segment(one)] if isinstance(segments, list) else []
        )
    return found


def _is_segment(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("changed", {}), dict):
        return False
    whole = isinstance(found.get("from_step", 0), int) and _is_time(found.get("started"))
    pairs = all(isinstance(one, list) and len(one) == 2 for one in found.get("changed", {}).values())
    return whole and pairs and isinstance(found.get("seconds"), int | float | None)


def _is_time(text: Any) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return False
    return True


def spans(state: Mapping[str, Any]) -> dict[str, list[Since]]:
    """The settings that were changed when the run was resumed, each with its values from the first step on.

    A run that went back to an older checkpoint has trained the steps behind it again, with its newer values.
    """
    found: dict[str, list[Since]] = {}
    for segment in state.get("segments") or ():
        start = int(segment.get("from_step") or 0)
        changed = segment.get("changed") or {}
        for path, (old, _) in changed.items():
            found.setdefault(path, [(0, old)])
        for path, values in found.items():
            value = changed[path][1] if path in changed else values[-1][1]
            before = [span for span in values if span[0] < start]
            found[path] = before if before and before[-1][1] == value else [*before, (start, value)]
    return found


def text_of_spans(values: list[Since]) -> str:
    """Example: `0.003 to step 4, then 1e-05`"""
    texts = [
        f"{setting_text(value)} to step {following:,}" for (_, value), (following, _) in pairwise(values)
    ]
    return ", then ".join([*texts, setting_text(values[-1][1])])


def history_lines(state: Mapping[str, Any]) -> list[str]:
    """One line for each setting that not all steps had alike: `train.lr: 0.003 to step 4, then 1e-05`."""
    return [f"{path}: {text_of_spans(values)}" for path, values in spans(state).items() if len(values) > 1]


def with_history(text: str, state: Mapping[str, Any]) -> str:
    """A run's resolved.yaml, which holds its newest values, headed by those that earlier steps had."""
    lines = history_lines(state)
    if not lines:
        return text
    return "".join(f"# {line}\n" for line in ("Not all steps had the values below:", *lines)) + text


def parent_text(state: Mapping[str, Any]) -> str:
    """The run that the student came from, in words; empty if it came from none."""
    parent = state.get("parent") or {}
    if not parent:
        return ""
    return f"run {parent.get('run')} (student {str(parent.get('digest'))[:12]})"
