"""The responses of all systems side by side, as data for the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from stillhouse.console import visible
from stillhouse.console.format import is_number
from stillhouse.report.metrics import MetricInfo, main_metric, metric_info
from stillhouse.report.systems import System

NO_SCORES = ("id", "seed", "sample", "tokens", "finished", "temperature")
"""Numbers of a row that say nothing about how good it is."""

MAX_CHARACTERS = 12_000_000
"""Characters of further responses (other seeds, temperatures, samples) on a page, so that it opens fast."""

_THUMBNAIL = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/]{1,32000}={0,2}")
"""What the page shows as an image: nothing that makes a browser ask for an address."""


@dataclass(frozen=True, slots=True)
class SideBySide:
    """What the page holds of the responses."""

    data: Markup
    """JSON that may stand in a script element."""
    prompts: int
    left_out: int
    """Further responses that are in the run folders only."""


@dataclass
class _Prompt:
    """One prompt with each system's rows for it, in the order of the seeds."""

    facts: dict[str, Any]
    rows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


def side_by_side(systems: Sequence[System]) -> SideBySide:
    """The responses of all systems, joined by task and prompt: the first of each always, further
    ones as far as there is room.

    `<`, `>` and `&` become escapes, so no text can close the element or open a comment; everything
    that is not ASCII is escaped by `json.dumps`, and control characters are replaced by visible ones. The
    page puts the text in as text, never as markup.
    """
    prompts = _joined(systems)
    kept, left_out = _within(prompts, MAX_CHARACTERS)
    mains = {
        task: main_metric(row for system in systems if system.task == task for row in system.rows)
        for task in dict.fromkeys(system.task for system in systems)
    }
    labels: dict[str, int] = {}
    rows = [
        {
            **prompt.facts,
            "responses": {
                index: _responses(own, kept[number, index], mains[systems[index].task], labels)
                for index, own in prompt.rows.items()
            },
        }
        for number, prompt in enumerate(prompts)
    ]
    named = [
        {
            "label": visible(system.label),
            "role": system.role,
            "colour": system.colour,
            "task": visible(system.task),
        }
        for system in systems
    ]
    found = {"systems": named, "labels": list(labels), "rows": rows}
    text = json.dumps(found, separators=(",", ":"), default=str)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return SideBySide(Markup(text), len(rows), left_out)


def _joined(systems: Sequence[System]) -> list[_Prompt]:
    """The prompts that have a response. Rows of one id are one prompt only if the question is the same: runs
    may have been measured on different rows."""
    prompts: dict[tuple[str, ...], _Prompt] = {}
    for index, system in enumerate(systems):
        for number, row in enumerate(system.rows):
            if "response" not in row:
                continue
            id, given = str(row.get("id", number)), row.get("references")
            references = [_text(text) for text in given] if isinstance(given, list) else []
            prompt_text = _text(row.get("prompt", ""))
            # Not by the prompt, if anything else tells: the teacher may have a chat template of its own.
            question = str(row.get("question") or (prompt_text if not references else ""))
            prompt = prompts.setdefault(
                (system.task, id, question, *references),
                _Prompt(
                    {
                        "id": visible(id),
                        "task": visible(system.task),
                        "prompt": prompt_text,
                        "references": references,
                    }
                ),
            )
            if shown := _images(row.get("images")):
                prompt.facts.setdefault("images", shown)
            prompt.rows.setdefault(index, []).append(row)
    return list(prompts.values())


def _images(given: Any) -> list[list[str]]:
    """[location, thumbnail or nothing] of each image that the question of a row shows."""
    found = []
    for image in given if isinstance(given, list) else []:
        if isinstance(image, dict):
            thumbnail = str(image.get("thumbnail", ""))
            thumbnail = thumbnail if _THUMBNAIL.fullmatch(thumbnail) else ""
            found.append([_text(image.get("location", "an image")), thumbnail])
    return found


def _within(prompts: Sequence[_Prompt], most: int) -> tuple[dict[tuple[int, int], int], int]:
    """How many responses of each prompt and system are shown, and how many are not: the first ones of all,
    then the second ones, and so on, until `most` characters are used."""
    counts = {(number, index): 1 for number, prompt in enumerate(prompts) for index in prompt.rows}
    whole = sum(len(rows) for prompt in prompts for rows in prompt.rows.values())
    for length, place in _further(prompts):
        most -= length
        if most < 0:
            break
        counts[place] += 1
    return counts, whole - sum(counts.values())


def _further(prompts: Sequence[_Prompt]) -> Iterator[tuple[int, tuple[int, int]]]:
    deepest = max((len(rows) for prompt in prompts for rows in prompt.rows.values()), default=0)
    for depth in range(1, deepest):
        for number, prompt in enumerate(prompts):
            for index, rows in prompt.rows.items():
                if depth < len(rows):
                    yield len(str(rows[depth]["response"])), (number, index)


def _responses(
    rows: list[dict[str, Any]], count: int, main: MetricInfo | None, labels: dict[str, int]
) -> list[Any]:
    """[score to sort by, a summary of all responses, the responses]."""
    values = [row.get(main.name) for row in rows] if main is not None else []
    known = [float(value) for value in values if is_number(value) and math.isfinite(value)]
    mean = sum(known) / len(known) if known else None
    summary = f"mean of {len(known)}: {main.label} {main.show(mean)}" if main and len(known) > 1 else ""
    shown = [_response(row, labels) for row in rows[:count]]
    return [None if mean is None else round(mean, 4), summary, shown]


def _response(row: dict[str, Any], labels: dict[str, int]) -> list[Any]:
    """[text, its scores and length, which one it is as an index into `labels`]."""
    facts = [
        f"{metric_info(name).label} {metric_info(name).show(value)}"
        for name, value in row.items()
        if name not in NO_SCORES and is_number(value)
    ]
    if is_number(row.get("tokens")):
        facts.append(f"{row['tokens']:,} tokens")
    if row.get("finished") is False:
        facts.append("cut off")
    which = [f"temperature {row['temperature']:g}"] if is_number(row.get("temperature")) else []
    which += [_text(row["run"])] if "run" in row else []
    which += [f"seed {_text(row['seed'])}"] if "seed" in row else []
    which += [f"sample {row['sample'] + 1}"] if is_number(row.get("sample")) else []
    label = labels.setdefault(", ".join(which), len(labels))
    return [_text(row["response"]), visible(" · ".join(facts)), label]


def _text(value: Any) -> str:
    return visible(str(value))
