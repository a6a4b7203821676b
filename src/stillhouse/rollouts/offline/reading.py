"""Stage files for people: the responses to each prompt from all sources, and why some were dropped."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.core.types import question_of
from stillhouse.errors import DataError
from stillhouse.rollouts.offline.stage_files import Row, read_header, read_rows

PAIR_SOURCES = ("teacher", "student")
_ROUND_FILE = re.compile(r"^(teacher|student)-(\d+)(?:\.resample-(\d+))?(?:\.shard-\d+-of-\d+)?\.jsonl$")
_SHOWN_FIELDS = ("response", "by", "finished", "student_version", "scores", "number")


@dataclass
class PromptResponses:
    """A prompt with the response of each source.

    Example:
        `PromptResponses("train:1", "Name a fruit.", {"teacher": {...}, "student": {...}}, dropped=[{...}])`
    """

    id: str
    prompt: str
    by_source: dict[str, Row] = field(default_factory=dict)
    """The rows of the stage files, the last attempt of each source."""
    dropped: list[Row] = field(default_factory=list)
    """Why it is not trained on: {source, filter, reason, detail}; empty if it is."""
    resampled: list[Row] = field(default_factory=list)
    """Why earlier attempts were resampled."""

    @property
    def gap(self) -> dict[str, float]:
        """By source: log-likelihood under the teacher minus that under the student, in nats per token."""
        gaps = {}
        for source, row in self.by_source.items():
            scores = row.get("scores", {})
            if "teacher" in scores and "student" in scores:
                gaps[source] = scores["teacher"] - scores["student"]
        return gaps

    def as_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "responses": {
                source: {
                    **{name: row[name] for name in _SHOWN_FIELDS if name in row},
                    "tokens": len(row.get("token_ids", ())),
                    **({"gap": self.gap[source]} if source in self.gap else {}),
                }
                for source, row in self.by_source.items()
            },
            "kept": not self.dropped,
            "dropped": self.dropped,
            "resampled": self.resampled,
        }


def round_files(folder: Path, number: int | None = None) -> tuple[int, dict[str, list[Path]]]:
    """The stage files of a round in a run folder, those of each source in the order of the attempts.

    Args:
        folder: the run folder, or its `responses` folder.
        number: which round, counted from 0; default: the newest.

    Raises:
        DataError: there is none.
    """
    place = folder / "responses" if (folder / "responses").is_dir() else folder
    found: dict[str, dict[int, list[tuple[int, str]]]] = {}
    for path in place.iterdir() if place.is_dir() else ():
        match = _ROUND_FILE.match(path.name)
        if match:
            source, count, attempt = match.group(1), int(match.group(2)), int(match.group(3) or 0)
            found.setdefault(source, {}).setdefault(count, []).append((attempt, path.name))
    rounds = sorted({count for counts in found.values() for count in counts})
    if not rounds:
        raise DataError(
            f"{folder}: holds no rounds of responses; runs whose responses.kind is pairs or generated do."
        )
    if number is not None and number not in rounds:
        raise DataError(f"{folder}: has no round {number}; it has {', '.join(map(str, rounds))}.")
    newest = rounds[-1] if number is None else number
    files = {}
    for source in PAIR_SOURCES:
        counts = [count for count in found.get(source, {}) if count <= newest]  # the teacher generates once
        if counts:
            files[source] = [place / name for _, name in sorted(found[source][max(counts)])]
    return newest, files


def read_round(folder: Path, number: int | None = None) -> list[PromptResponses]:
    """A round of a run, finished or still in progress, in the order of the prompts."""
    newest, files = round_files(folder, number)
    prompts: dict[str, PromptResponses] = {}
    attempts: dict[tuple[str, str], int] = {}
    for source, paths in files.items():
        for path in paths:
            match = _ROUND_FILE.match(path.name)
            attempt = int(match.group(3) or 0) if match else 0
            for row in read_rows(path) if read_header(path) else ():
                _add(prompts, row, source)
                attempts[source, row["id"]] = attempt
    drops = next(iter(files.values()))[0].with_name(f"curation-{newest}.jsonl")
    for row in read_rows(drops) if drops.exists() else ():
        if row["id"] in prompts:
            why = {name: row[name] for name in ("source", "attempt", "filter", "reason", "detail")}
            last = row["attempt"] >= attempts.get((row["source"], row["id"]), 0)
            found = prompts[row["id"]]
            (found.dropped if last else found.resampled).append(why)
    return list(prompts.values())


def read_stage_files(paths: Sequence[Path]) -> list[PromptResponses]:
    """The responses in stage files, those to one prompt (and with one index) together.

    Raises:
        DataError: a file is missing or no stage file.
    """
    prompts: dict[str, PromptResponses] = {}
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file or run folder")
        for row in read_rows(path) if read_header(path) else ():
            found = _add(prompts, row, row.get("source", "fixed"))
            found.dropped.extend(row.get("dropped", ()))
    return list(prompts.values())


def select(
    prompts: Sequence[PromptResponses],
    *,
    number: int,
    seed: int | None,
    id: str | None,
    dropped: bool = False,
) -> list[PromptResponses]:
    """Some of the prompts: those of an id, a random sample, or the first.

    Args:
        prompts: all of them.
        number: how many.
        seed: of the random sample; None takes the first.
        id: only this prompt.
        dropped: only those that a filter dropped.

    Raises:
        DataError: there is no prompt with that id.
    """
    pool = [one for one in prompts if one.dropped] if dropped else list(prompts)
    if id is not None:
        found = [one for one in pool if one.id == id or one.id.startswith(f"{id}#")]
        if not found:
            known = ", ".join(one.id for one in pool[:3]) or "(none)"
            raise DataError(f"--id: there is no prompt {id!r}; ids are such as {known}")
        return found
    if seed is None:
        return pool[:number]
    picked = random.Random(seed).sample(range(len(pool)), min(number, len(pool)))
    return [pool[place] for place in sorted(picked)]


def _add(prompts: dict[str, PromptResponses], row: Row, source: str) -> PromptResponses:
    index = row.get("sample", 0)
    name = f"{row['id']}#{index + 1}" if index else str(row["id"])
    found = prompts.setdefault(name, PromptResponses(name, question_of(row)))
    found.by_source[source] = row
    return found
