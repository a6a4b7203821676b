"""Stage files as people look at them: prompt by prompt, both sides, and what became of them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.core.types import question_of
from stillhouse.errors import DataError
from stillhouse.rollouts.offline.stages import Row, read_header, read_rows

SIDES = ("teacher", "student")
_ROUND = re.compile(r"^(teacher|student)-(\d+)(?:\.again-(\d+))?(?:\.part-\d+-of-\d+)?\.jsonl$")


@dataclass
class Asked:
    """A prompt with what stands on each side.

    Example: `Asked("train:1", "Name a fruit.", {"teacher": {...}, "student": {...}}, dropped=[{...}])`
    """

    id: str
    prompt: str
    sides: dict[str, Row] = field(default_factory=dict)
    """The rows of the stage files, the newest attempt of each side."""
    dropped: list[Row] = field(default_factory=list)
    """Why it is not trained on: {side, filter, reason, detail}; empty if it is."""
    rewritten: list[Row] = field(default_factory=list)
    """Why earlier attempts were written again."""

    @property
    def gap(self) -> dict[str, float]:
        """By side: how much likelier the teacher finds the text than the student, in nats per token."""
        gaps = {}
        for side, row in self.sides.items():
            scores = row.get("scores", {})
            if "teacher" in scores and "student" in scores:
                gaps[side] = scores["teacher"] - scores["student"]
        return gaps

    def as_json(self) -> dict[str, Any]:
        """As one JSON object."""
        kept = ("response", "by", "finished", "student_version", "scores", "number")
        return {
            "id": self.id,
            "prompt": self.prompt,
            "sides": {
                side: {
                    **{name: row[name] for name in kept if name in row},
                    "tokens": len(row.get("token_ids", ())),
                    **({"gap": self.gap[side]} if side in self.gap else {}),
                }
                for side, row in self.sides.items()
            },
            "kept": not self.dropped,
            "dropped": self.dropped,
            "rewritten": self.rewritten,
        }


def files_of_round(folder: Path, number: int | None = None) -> tuple[int, dict[str, list[Path]]]:
    """The stage files of a round in a run folder, each side's first attempt first.

    Args:
        folder: the run folder, or its `responses` folder.
        number: which round, counted from 0; default: the newest.

    Raises:
        DataError: there is none.
    """
    place = folder / "responses" if (folder / "responses").is_dir() else folder
    found: dict[str, dict[int, list[tuple[int, str]]]] = {}
    for path in place.iterdir() if place.is_dir() else ():
        match = _ROUND.match(path.name)
        if match:
            side, count, attempt = match.group(1), int(match.group(2)), int(match.group(3) or 0)
            found.setdefault(side, {}).setdefault(count, []).append((attempt, path.name))
    rounds = sorted({count for counts in found.values() for count in counts})
    if not rounds:
        raise DataError(
            f"{folder}: holds no rounds of responses; runs whose responses.kind is pairs or generated do."
        )
    if number is not None and number not in rounds:
        raise DataError(f"{folder}: has no round {number}; it has {', '.join(map(str, rounds))}.")
    newest = rounds[-1] if number is None else number
    chosen = {}
    for side in SIDES:
        counts = [count for count in found.get(side, {}) if count <= newest]  # the teacher writes once
        if counts:
            chosen[side] = [place / name for _, name in sorted(found[side][max(counts)])]
    return newest, chosen


def read_round(folder: Path, number: int | None = None) -> list[Asked]:
    """A round of a run, also one that is still being written, in the order of the prompts."""
    newest, files = files_of_round(folder, number)
    asked: dict[str, Asked] = {}
    attempts: dict[tuple[str, str], int] = {}
    for side, paths in files.items():
        for path in paths:
            match = _ROUND.match(path.name)
            attempt = int(match.group(3) or 0) if match else 0
            for row in read_rows(path) if read_header(path) else ():
                _add(asked, row, side)
                attempts[side, row["id"]] = attempt
    verdicts = next(iter(files.values()))[0].with_name(f"curation-{newest}.jsonl")
    for row in read_rows(verdicts) if verdicts.exists() else ():
        if row["id"] in asked:
            told = {name: row[name] for name in ("side", "attempt", "filter", "reason", "detail")}
            last = row["attempt"] >= attempts.get((row["side"], row["id"]), 0)
            (asked[row["id"]].dropped if last else asked[row["id"]].rewritten).append(told)
    return list(asked.values())


def read_files(paths: Sequence[Path]) -> list[Asked]:
    """What stands in stage files, the rows for one prompt (and of one number of sample) together.

    Raises:
        DataError: a file is missing or no stage file.
    """
    asked: dict[str, Asked] = {}
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file or run folder")
        for row in read_rows(path) if read_header(path) else ():
            name = _add(asked, row, row.get("source", "fixed"))
            if "dropped" in row:
                asked[name].dropped.extend(row["dropped"])
    return list(asked.values())


def chosen(
    asked: Sequence[Asked], *, number: int, seed: int | None, id: str | None, dropped: bool = False
) -> list[Asked]:
    """Some of them: those of an id, or a random choice, or the first.

    Raises:
        DataError: nobody has that id.
    """
    pool = [one for one in asked if one.dropped] if dropped else list(asked)
    if id is not None:
        found = [one for one in pool if one.id == id or one.id.startswith(f"{id}#")]
        if not found:
            raise DataError(
                f"--id: there is no prompt {id!r}; ids are such as {', '.join(_some(pool)) or '(none)'}"
            )
        return found
    if seed is None:
        return pool[:number]
    picked = random.Random(seed).sample(range(len(pool)), min(number, len(pool)))
    return [pool[place] for place in sorted(picked)]


def _some(asked: Iterable[Asked]) -> list[str]:
    return [one.id for one, _ in zip(asked, range(3), strict=False)]


def _add(asked: dict[str, Asked], row: Row, side: str) -> str:
    index = row.get("sample", 0)
    name = f"{row['id']}#{index + 1}" if index else str(row["id"])
    found = asked.setdefault(name, Asked(name, question_of(row)))
    found.sides[side] = row
    return name
