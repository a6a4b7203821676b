"""The answers of two systems that a judge compares, matched by question and images."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from stillhouse.config import nearest
from stillhouse.core.images import IMAGE_MARK, ImageLimits, ImageRef, without_images
from stillhouse.core.types import turn_text
from stillhouse.data.formats import read_row
from stillhouse.data.formats.images import IMAGE_FIELDS
from stillhouse.data.images import ImageOptions, opened
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import ConfigError, DataError, Fault, RowError
from stillhouse.evaluate.judge import AnswerPair
from stillhouse.evaluate.shown_images import kept_limits
from stillhouse.evaluate.tasks.instructions import instruction_rows
from stillhouse.files import STAGE

logger = logging.getLogger("stillhouse")

AGAINST = "against-"
"""Prefix of the task name of a judgement among the results of a run."""

_SHOWN = re.compile(rf"(?:^|\s){re.escape(IMAGE_MARK)}(?:\s|$)")
"""Where an image stood in a question that was kept as text."""
_NAMED = 3
"""Answers whose images cannot be read that a message names; the others are counted."""


@dataclass(frozen=True, slots=True)
class JudgedSystem:
    """A system with a file of its answers.

    Example: `JudgedSystem("kd", Path("runs/kd/evaluation/student-after.dolly.jsonl"), run=Path("runs/kd"))`
    """

    label: str
    path: Path
    run: Path | None
    """The run folder that the answers are from, if there is one."""


def find_answers(path: Path, task: str | None, option: str) -> JudgedSystem:
    """The system behind a path of the command line.

    Args:
        path: a JSONL file, or a run folder or its student's, of which the student after training is taken.
        task: which task of a run folder; None: its only one, or the held-out prompts.
        option: name of the path in messages.

    Raises:
        ConfigError: there is no such file, or no such task in the folder.
    """
    if path.is_file():
        run = path.parent.parent if path.parent.name == "evaluation" else None
        system = path.stem.partition(".")[0]
        own = run is not None and system == "student-after"
        return JudgedSystem(run.name if run is not None and own else path.stem, path, run if own else None)
    of_student = path.name == "student" and (path.parent / "evaluation").is_dir()
    folder = (path.parent if of_student else path) / "evaluation"
    named = {file.stem.partition(".")[2]: file for file in sorted(folder.glob("student-after*.jsonl"))}
    found = {name: file for name, file in named.items() if AGAINST not in name}
    if not found:
        raise ConfigError(
            Fault(option, f"{path} is neither a file of answers nor a run folder with evaluated answers")
        )
    name = task or ("" if "" in found or task is not None else next(iter(found)))
    if name not in found or (task is None and name and len(found) > 1):
        problem = "is ambiguous" if task is None else f"{path} has no answers to it"
        allowed = ", ".join(one or "(none: the held-out prompts)" for one in found)
        raise ConfigError(Fault("--task", problem + nearest(name, list(found)), got=task, allowed=allowed))
    return JudgedSystem(folder.absolute().parent.name, found[name], folder.parent)


def pair_answers(
    first: JudgedSystem, second: JudgedSystem, limit: int | None, max_side: int | None = None
) -> list[AnswerPair]:
    """The questions that both systems have answered, in the order of the first file.

    Rows are matched by their question, whatever their ids are: the same id may be another question in another
    file. Of several answers to one question (seeds, samples) the first counts. Images are read at the
    tightest of the limits at which the systems read theirs and of `max_side`.

    Args:
        first: the system whose answers come first.
        second: the other one.
        limit: at most this many questions.
        max_side: of images, in pixels.

    Raises:
        ConfigError: both are the same file.
        DataError: a file or an image cannot be read, or no question is in both.
    """
    if first.path.resolve() == second.path.resolve():
        raise ConfigError(Fault("B", "is the file of A", got=str(second.path)))
    files = _rows_of(first.path), _rows_of(second.path)
    limits = _tightest((row for rows in files for _, row in rows), max_side)
    ours, theirs = (
        _answers(rows, one.path, limits) for rows, one in zip(files, (first, second), strict=True)
    )
    common = [key for key in ours if key in theirs]
    unpaired = len(ours) + len(theirs) - 2 * len(common)
    if not common:
        raise DataError(f"{first.path} and {second.path} have no question in common.")
    if unpaired:
        logger.warning("%d questions are in one of the two files only and are not judged", unpaired)
    return [
        AnswerPair(
            ours[key].id, ours[key].question, ours[key].response, theirs[key].response, ours[key].images
        )
        for key in common[:limit]
    ]


class _Answer(NamedTuple):
    id: str
    question: str
    response: str
    images: tuple[ImageRef, ...]


def _rows_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file of answers, each with its file and line.

    Raises:
        DataError: the file or a row cannot be read.
    """
    found = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason}); answers are JSON Lines") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if STAGE in row:  # the header of a file of `stillhouse generate`
                continue
            row["response"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: is not a row of answers ({type(error).__name__}: {error}); needs "
                "`response`, and `prompt`, `question` or `instruction`"
            ) from error
        found.append((f"{path}:{number}", row))
    return found


def _answers(
    rows: Sequence[tuple[str, dict[str, Any]]], path: Path, limits: ImageLimits
) -> dict[tuple[str, ...], _Answer]:
    """The first answer to each question, by the question without differences of white space and by what its
    images show.

    Raises:
        DataError: questions show images that cannot be read; the message counts them.
    """
    found: dict[tuple[str, ...], _Answer] = {}
    questions = _Questions(path.parent, limits)
    unread: list[str] = []
    for where, row in rows:
        try:
            question, images = questions.read(row, where)
        except RowError as error:
            unread.append(str(error))
            continue
        answer = _Answer(str(row.get("id", question)), question, str(row["response"]), images)
        found.setdefault((" ".join(question.split()), *(image.digest for image in images)), answer)
    if unread:
        raise DataError(
            f"{path}: the images of {len(unread)} of {len(rows)} answers cannot be shown to the judge: "
            + "; ".join(unread[:_NAMED])
            + (f"; and {len(unread) - _NAMED} more" if len(unread) > _NAMED else "")
            + ". Put the images back, or evaluate again, which keeps them in the rows."
        )
    return found


class _Questions:
    """Reads the questions of a file of answers with their images, which the first answer to each holds."""

    def __init__(self, folder: Path, limits: ImageLimits) -> None:
        self.folder, self.limits = str(folder), limits
        self._images: dict[str, Any] = {}

    def read(self, row: Mapping[str, Any], where: str) -> tuple[str, tuple[ImageRef, ...]]:
        """The question without the wording of Alpaca's template, and its images.

        Raises:
            RowError: an image is not there, is another one than when the question was answered, or cannot be
                read; or the question shows one and the row has none.
            DataError: the row has no question.
        """
        own = json.dumps([row.get(name) for name in ("id", "prompt", "question")])
        shown = {name: row[name] for name in IMAGE_FIELDS if row.get(name)}
        if shown:
            self._images[own] = shown
        elif "id" in row:
            shown = self._images.get(own, {})
        question, images = self._read(row, shown, where)
        if not images and _SHOWN.search(question):
            problem = f"the question shows an image ({IMAGE_MARK}), and the row has no `images`"
            raise RowError(where, problem, "image missing")
        return question, images

    def _read(
        self, row: Mapping[str, Any], shown: Mapping[str, Any], where: str
    ) -> tuple[str, tuple[ImageRef, ...]]:
        asked = {name: row[name] for name in ("question", "instruction", "input", "prompt") if row.get(name)}
        if "question" in asked and not shown:
            return str(asked["question"]), ()
        if "question" in asked:
            one = read_row({"prompt": str(asked["question"]), **shown}, Fields(), where)
        else:
            (one,) = instruction_rows({**asked, **shown}, Fields(), where)[:1]
        images = self._opened(replace(one, folder=self.folder))
        if one.messages:
            return "\n".join(map(turn_text, one.messages)), images
        return without_images("\n\n".join(filter(None, (one.instruction, one.input)))).strip(), images

    def _opened(self, row: Row) -> tuple[ImageRef, ...]:
        for value in row.image_values:
            answered = kept_limits(value)
            if answered is None:
                continue
            (found,) = opened(replace(row, image_values=(value,)), _options(answered)).images
            if found.digest != value.get("digest"):
                problem = f"its image ({value.get('location')}) is another one than when it was answered"
                raise RowError(row.location, problem, "image that has changed")
        return opened(row, _options(self.limits)).images


def _options(limits: ImageLimits) -> ImageOptions:
    """Of images that a system has read: nothing but the resolution is limited."""
    return ImageOptions(
        max_side=limits.max_side,
        max_pixels=limits.max_pixels,
        max_source_pixels=178_956_970,
        max_bytes=2**40,
    )


def _tightest(rows: Iterable[Mapping[str, Any]], max_side: int | None) -> ImageLimits:
    """The smallest of the limits at which images were read, or the default where none was, and `max_side`."""
    entries = (one for row in rows for one in row.get("images") or () if isinstance(row["images"], list))
    known = [limits for limits in map(kept_limits, entries) if limits is not None]
    sides = [limits.max_side for limits in known] if known else [ImageLimits().max_side]
    return ImageLimits(
        max_side=min((side for side in (*sides, max_side) if side is not None), default=None),
        max_pixels=min((one.max_pixels for one in known if one.max_pixels is not None), default=None),
    )
