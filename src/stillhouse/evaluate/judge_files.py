"""Has a model judge the answers of two systems, from files or run folders, and saves result and verdicts."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stillhouse import console
from stillhouse.config import nearest
from stillhouse.core.images import IMAGE_MARK
from stillhouse.core.journal import Journal, content_digest
from stillhouse.core.types import turn_text
from stillhouse.data.rows import Fields
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.evaluate.judge import (
    AnswerPair,
    JudgedPair,
    Rubric,
    has_markup,
    judge_pairs,
    win_rate_metrics,
)
from stillhouse.evaluate.tasks.instructions import instruction_rows
from stillhouse.files import STAGE, write_json, write_jsonl
from stillhouse.remote import ServerConnection
from stillhouse.remote.client import Usage

logger = logging.getLogger("stillhouse")

AGAINST = "against-"
"""Prefix of the task name of a judgement among the results of a run."""


@dataclass(frozen=True, slots=True)
class JudgedSystem:
    """A system with a file of its answers.

    Example: `JudgedSystem("kd", Path("runs/kd/evaluation/student-after.dolly.jsonl"), run=Path("runs/kd"))`
    """

    label: str
    path: Path
    run: Path | None
    """The run folder that the answers are from, if there is one."""


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """The price of a million tokens, in any currency."""

    prompt: float | None = None
    completion: float | None = None


def find_answers(path: Path, task: str | None, option: str) -> JudgedSystem:
    """The system behind a path of the command line.

    Args:
        path: a JSONL file, or a run folder, of which the student after training is taken.
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
    folder = path / "evaluation"
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
    return JudgedSystem(path.name, found[name], path)


def pair_answers(first: JudgedSystem, second: JudgedSystem, limit: int | None) -> list[AnswerPair]:
    """The questions that both systems have answered, in the order of the first file.

    Rows are matched by their question, whatever their ids are: the same id may be another question in another
    file. Of several answers to one question (seeds, samples) the first counts.

    Raises:
        ConfigError: both are the same file.
        DataError: a file cannot be read, or no question is in both.
    """
    if first.path.resolve() == second.path.resolve():
        raise ConfigError(Fault("B", "is the file of A", got=str(second.path)))
    ours, theirs = _answers(first.path), _answers(second.path)
    common = [key for key in ours if key in theirs]
    unpaired = len(ours) + len(theirs) - 2 * len(common)
    if not common:
        raise DataError(f"{first.path} and {second.path} have no question in common.")
    if unpaired:
        logger.warning("%d questions are in one of the two files only and are not judged", unpaired)
    return [
        AnswerPair(ours[key].id, ours[key].question, ours[key].response, theirs[key].response)
        for key in common[:limit]
    ]


_SHOWN = re.compile(rf"(?:^|\s){re.escape(IMAGE_MARK)}(?:\s|$)")
"""Where an image stood in a question that an evaluation has kept as text."""


class _Answer(NamedTuple):
    id: str
    question: str
    response: str


def _answers(path: Path) -> dict[str, _Answer]:
    """The first answer to each question, by the question without differences of white space."""
    found: dict[str, _Answer] = {}
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
            response = row["response"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: is not a row of answers ({type(error).__name__}: {error}); needs "
                "`response`, and `prompt`, `question` or `instruction`"
            ) from error
        question = _question(row, f"{path}:{number}")
        if row.get("images") or row.get("image") or _SHOWN.search(question):
            raise DataError(
                f"{path}:{number}: the question shows an image, which the judge is not sent: it would judge "
                "answers to a picture that it does not see. Judge rows of text alone, or use the task vqa."
            )
        answer = _Answer(str(row.get("id", question)), question, str(response))
        found.setdefault(" ".join(question.split()), answer)
    return found


def _question(row: Mapping[str, Any], where: str) -> str:
    """The question without the wording of Alpaca's template."""
    asked = {name: row[name] for name in ("question", "instruction", "input", "prompt") if row.get(name)}
    if "question" in asked:
        return str(asked["question"])
    (one,) = instruction_rows(asked, Fields(), where)[:1]
    if one.messages:
        return "\n".join(map(turn_text, one.messages))
    return "\n\n".join(filter(None, (one.instruction, one.input))).strip()


def judge_files(
    first: JudgedSystem,
    second: JudgedSystem,
    server: ServerConnection,
    rubric: Rubric,
    output: Path,
    *,
    limit: int | None = None,
    price: TokenPrice = TokenPrice(),
) -> dict[str, Any]:
    """Judge every pair of answers; write and return the result.

    Replies are saved as they come, in `.replies/NAME.jsonl` next to the result: the same command resumes an
    interrupted judgement, and costs nothing once it is complete.

    Args:
        first: the system whose win rate is measured.
        second: the system that it is compared with.
        server: serves the judge.
        rubric: the judge's prompt and sampling.
        output: the result (JSON); verdicts go next to it (JSONL).
        limit: at most this many questions.
        price: for the cost in the result.

    Raises:
        StillhouseError: a file or the server cannot be used, or no pair has a clear verdict.
    """
    rubric_digest = content_digest(rubric.text())  # a wrong rubric is told before any answer is read
    pairs = pair_answers(first, second, limit)
    num_marked = sum(map(has_markup, pairs))
    if num_marked:
        logger.warning(
            "%d pairs contain marks such as [[A]] or </answer_a>, which the judge sees as [A]", num_marked
        )
    judged, model, usage = _judged_by_server(pairs, server, rubric, output)
    verdicts = output.with_suffix(".jsonl")
    write_jsonl(verdicts, _rows(pairs, judged))
    result = {
        "system": "student after" if first.run is not None else first.label,
        "label": first.label,
        "task": _task(first, second),
        "settings": {
            "judge": model,
            "server": server.url,
            "rubric": str(rubric.file or "pairwise.txt of the package"),
            "rubric_digest": rubric_digest,
            "temperature": rubric.temperature,
            "max_tokens": rubric.max_tokens,
            "orders": "both; a tie counts half",
            "interval": "95 %, Wilson, over the pairs",
            "pairs": len(pairs),
            "pairs_with_marks": num_marked,
            "answers": [str(first.path), str(second.path)],
            "requests_of_the_last_call": usage.requests,
            "retries_of_the_last_call": usage.retries,
        },
        "metrics": _metrics(judged, price, verdicts),
    }
    write_json(output, result)
    return result


def _judged_by_server(
    pairs: Sequence[AnswerPair], server: ServerConnection, rubric: Rubric, output: Path
) -> tuple[list[JudgedPair], str, Usage]:
    """The judged pairs, the judge's name, and the requests that this took."""
    client = server.client()
    try:
        model = server.model_name(client)
        # Equal questions have equal keys, whichever judge, rubric or pair they belong to: one file for all.
        replies = Journal(output.parent / ".replies" / f"{output.stem}.jsonl")
        with console.progress(f"Judging by {model}", total=2 * len(pairs)) as bar:
            judged = judge_pairs(pairs, client, model, rubric, replies, bar.advance)
    finally:
        client.close()
    return judged, model, client.usage


def _metrics(judged: Sequence[JudgedPair], price: TokenPrice, verdicts: Path) -> dict[str, Any]:
    """Win rate and counts, tokens, and their cost where a price is known."""
    prompt_tokens = sum(one.prompt_tokens for one in judged)
    completion_tokens = sum(one.completion_tokens for one in judged)
    try:
        metrics: dict[str, Any] = dict(win_rate_metrics(judged))
    except DataError as error:
        raise DataError(f"{error} Its replies are in {verdicts}.") from error
    metrics |= {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    if metrics["unparsable"]:
        logger.warning(
            "%d of %d replies contain no clear verdict; their pairs are left out. The replies are in %s",
            metrics["unparsable"],
            2 * len(judged),
            verdicts,
        )
    if price.prompt is not None or price.completion is not None:
        cost = prompt_tokens * (price.prompt or 0.0) + completion_tokens * (price.completion or 0.0)
        metrics["cost"] = cost / 1e6
    return metrics


def _task(first: JudgedSystem, second: JudgedSystem) -> str:
    name = first.path.stem.partition(".")[2]
    return " ".join(filter(None, (name, f"against {second.label}")))


def _rows(pairs: Sequence[AnswerPair], judged: Sequence[JudgedPair]) -> list[dict[str, Any]]:
    return [
        {
            "id": pair.id,
            "prompt": pair.question,
            "references": [],
            "response": pair.first,
            "other": pair.second,
            "verdict": one.verdicts[0],
            "verdict_swapped": one.verdicts[1],
            "score": one.score,
            "reply": one.replies[0],
            "reply_swapped": one.replies[1],
        }
        for pair, one in zip(pairs, judged, strict=True)
    ]


def default_output(first: JudgedSystem, second: JudgedSystem) -> Path:
    """Next to the first system's answers in its run folder, where the report finds it.

    Raises:
        ConfigError: the first system's answers are not in a run folder.
    """
    if first.run is None:
        raise ConfigError(
            Fault("--output", "is missing", hint="A's answers are not in a run folder: give -o judged.json.")
        )
    stem = ".".join(filter(None, (first.path.stem, f"{AGAINST}{second.label}")))
    return first.run / "evaluation" / f"{stem}.json"
