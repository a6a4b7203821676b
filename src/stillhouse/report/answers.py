"""The responses of all systems side by side, as data for the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from stillhouse import console
from stillhouse.report.measures import Measure, is_number, main_measure, measure
from stillhouse.report.systems import System

NO_SCORES = ("id", "seed", "sample", "tokens", "finished", "temperature")
"""Numbers of a row that say nothing about how good it is."""


def answers_json(systems: Sequence[System]) -> Markup:
    """The responses of all systems, joined by task and prompt, as JSON that may stand in a script element.

    `<`, `>` and `&` are written as escapes, so no text can close the element or open a comment; everything
    that is not ASCII is escaped by `json.dumps`, and control characters are replaced by visible ones. The
    page puts the text in as text, never as markup.
    """
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    mains = {
        task: main_measure(row for system in systems if system.task == task for row in system.rows)
        for task in dict.fromkeys(system.task for system in systems)
    }
    for index, system in enumerate(systems):
        for number, row in enumerate(system.rows):
            key = (system.task, str(row.get("id", number)))
            told = row.get("references")
            references = [_text(text) for text in told] if isinstance(told, list) else []
            entry = prompts.setdefault(
                key,
                {
                    "id": console.visible(key[1]),
                    "task": console.visible(key[0]),
                    "prompt": _text(row.get("prompt", "")),
                    "references": [_text(text) for text in references]
                    if isinstance(references, list)
                    else [],
                    "responses": {},
                },
            )
            # One answer a prompt: with several seeds the first; all of them are in the run folder.
            if index not in entry["responses"] and "response" in row:
                entry["responses"][index] = _answer(row, mains[system.task])
    named = [
        {
            "label": console.visible(system.label),
            "role": system.role,
            "colour": system.colour,
            "task": console.visible(system.task),
        }
        for system in systems
    ]
    rows = [entry for entry in prompts.values() if entry["responses"]]
    text = json.dumps({"systems": named, "rows": rows}, separators=(",", ":"), default=str)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _answer(row: dict[str, Any], main: Measure | None) -> list[Any]:
    """[text, score that is sorted by, what is written about it]."""
    score = row.get(main.name) if main is not None else None
    facts = [
        f"{measure(name).label} {measure(name).show(value)}"
        for name, value in row.items()
        if name not in NO_SCORES and is_number(value)
    ]
    if is_number(row.get("temperature")):
        facts.append(f"temperature {row['temperature']:g}")
    if is_number(row.get("tokens")):
        facts.append(f"{row['tokens']:,} tokens")
    if row.get("finished") is False:
        facts.append("cut off")
    known = round(float(score), 4) if is_number(score) and math.isfinite(score) else None
    return [_text(row["response"]), known, " · ".join(facts)]


def _text(value: Any) -> str:
    return console.visible(str(value))
