"""Has a model judge the answers of two systems, from files or run folders, and saves result and verdicts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse import console
from stillhouse.core.journal import Journal, content_digest
from stillhouse.errors import ConfigError, DataError, Fault
from stillhouse.evaluate.judge import (
    AnswerPair,
    JudgedPair,
    Rubric,
    has_markup,
    judge_pairs,
    win_rate_metrics,
)
from stillhouse.evaluate.judge_answers import AGAINST, JudgedSystem, pair_answers
from stillhouse.evaluate.shown_images import ShownImages
from stillhouse.files import write_json, write_jsonl
from stillhouse.remote import ServerConnection
from stillhouse.remote.client import Usage

logger = logging.getLogger("stillhouse")


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """The price of a million tokens, in any currency."""

    prompt: float | None = None
    completion: float | None = None


def judge_files(
    first: JudgedSystem,
    second: JudgedSystem,
    server: ServerConnection,
    rubric: Rubric,
    output: Path,
    *,
    limit: int | None = None,
    max_side: int | None = None,
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
        max_side: of images, in pixels; default: at which the systems read theirs.
        price: for the cost in the result.

    Raises:
        StillhouseError: a file or the server cannot be used, or no pair has a clear verdict.
    """
    rubric_digest = content_digest(rubric.text())  # a wrong rubric is told before any answer is read
    pairs = pair_answers(first, second, limit, max_side)
    shown = _what_is_shown(pairs)
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
            **shown,
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


def _what_is_shown(pairs: Sequence[AnswerPair]) -> dict[str, Any]:
    """How many pairs there are, with marks and with images, and the limits of these; marks are told."""
    num_marked = sum(map(has_markup, pairs))
    if num_marked:
        logger.warning(
            "%d pairs contain marks such as [[A]] or </answer_a>, which the judge sees as [A]", num_marked
        )
    settings: dict[str, Any] = {"pairs": len(pairs), "pairs_with_marks": num_marked}
    images = [image for pair in pairs for image in pair.images]
    if images:
        limits = images[0].limits
        settings |= {"images": len(images), "max_side": limits.max_side, "max_pixels": limits.max_pixels}
    return settings


def _task(first: JudgedSystem, second: JudgedSystem) -> str:
    name = first.path.stem.partition(".")[2]
    return " ".join(filter(None, (name, f"against {second.label}")))


def _rows(pairs: Sequence[AnswerPair], judged: Sequence[JudgedPair]) -> list[dict[str, Any]]:
    shown = ShownImages()
    return [
        {
            "id": pair.id,
            "prompt": pair.question,
            **shown.fields(str(number), pair.images),
            "references": [],
            "response": pair.first,
            "other": pair.second,
            "verdict": one.verdicts[0],
            "verdict_swapped": one.verdicts[1],
            "score": one.score,
            "reply": one.replies[0],
            "reply_swapped": one.replies[1],
        }
        for number, (pair, one) in enumerate(zip(pairs, judged, strict=True))
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
