"""Whether results were measured alike: on the same questions, with the same sampling, seeds and limits."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.report.measures import plain
from stillhouse.report.record import leaves
from stillhouse.report.systems import System

OF_THE_MODEL = ("template", "dtype")
"""Settings that belong to a model rather than to the measurement, such as a teacher's own template."""
NO_MATTER = (
    "answers", "data", "dropped", "truncated", "dtype", "server", "requests_of_the_last_call",
    "retries_of_the_last_call", "questions_in_one_only",
)  # fmt: skip
"""Settings that may differ without making two results unlike: where the rows are from (`questions_digest`
stands for what they say), what a tokenizer made too long, what a call of a server took."""
COUNTS = ("prompts", "questions")


def unlike(one: System, other: System, but: Sequence[str] = ()) -> list[str]:
    """The settings in which two results differ, of those that both tell.

    Args:
        one: a result on a task.
        other: another one on the same task.
        but: settings that may differ.
    """
    ours, theirs = dict(leaves(one.settings)), dict(leaves(other.settings))
    return [
        name
        for name in ours
        if name in theirs
        and ours[name] != theirs[name]
        and not {name, name.partition(".")[0]} & {*NO_MATTER, *but}
    ]


def differences(systems: Sequence[System]) -> list[str]:
    """In what the results on one task were not measured alike, one text for each setting.

    Example: `["sampling.temperature 0 (kd), 1 (gkd, sft)", "other questions or references"]`
    """
    names = dict.fromkeys(
        name
        for index, one in enumerate(systems)
        for other in systems[index + 1 :]
        for name in unlike(one, other, OF_THE_MODEL if "teacher" in (one.role, other.role) else ())
    )
    told = []
    for name in names:
        if name == "questions_digest":
            told += [] if names.keys() & set(COUNTS) else ["other questions or references"]
            continue
        groups: dict[str, list[str]] = {}
        for system in systems:
            found = dict(leaves(system.settings))
            if name in found:
                groups.setdefault(plain(found[name]), []).append(system.label)
        values = ", ".join(f"{value} ({', '.join(who)})" for value, who in groups.items())
        told.append(f"{name.replace('_', ' ')} {values}")
    return told
