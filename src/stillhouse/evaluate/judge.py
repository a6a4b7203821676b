"""An LLM judge that compares two answers: its prompt, its verdicts, and the win rate over many pairs.

Every pair is judged in both orders, because judges favour a position (Zheng et al. 2023, arXiv 2306.05685,
section 3.3), as in DistiLLM-2 (arXiv 2503.07067).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stillhouse.config import FilePath, StrictConfig
from stillhouse.core.images import IMAGE, IMAGE_MARK, ImageRef, without_images
from stillhouse.core.journal import Journal, content_digest
from stillhouse.errors import ConfigError, DataError, Fault, ServerError
from stillhouse.remote.answers import checked_text, only_choice

if TYPE_CHECKING:
    from stillhouse.remote.client import Client

Verdict = Literal["A", "B", "C"]
"""The first answer, the second, or neither."""

PLACEHOLDERS = ("question", "answer_a", "answer_b")
_PLACEHOLDER = re.compile(r"\{(question|answer_a|answer_b)\}")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_MARKUP = re.compile(r"\[\[+([ABC])\]\]+|<(/?(?:question|answer_a|answer_b))>")
"""What could pass for a verdict, or for the end of an answer, inside an answer."""

_IMAGE_REQUESTS = 32
"""Requests with images whose pixels are held at a time."""


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """One question with the answers of both systems.

    Example: `AnswerPair("dolly:1", "Name a fruit.", first="Fig.", second="A fruit is ...")`
    """

    id: str
    question: str
    """With `<image>` where an image stands; images without such places stand before it."""
    first: str
    second: str
    images: tuple[ImageRef, ...] = ()
    """What the question shows."""


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """The judge's verdicts on one pair.

    Example: `JudgedPair("dolly:1", verdicts=("A", "B"), score=1.0)` (the first system won in both orders)
    """

    id: str
    verdicts: tuple[Verdict | None, Verdict | None]
    """With the first system's answer as A, and as B; None where the reply has no verdict."""
    score: float | None
    """1 if the first system wins, 0 if the second does, 1/2 for a tie; the mean of both orders. None unless
    both replies have a verdict."""
    prompt_tokens: int = 0
    """Of both requests together, as the server counts."""
    completion_tokens: int = 0
    replies: tuple[str, str] = ("", "")
    """What the judge wrote, in both orders."""


class Rubric(StrictConfig):
    """The judge's prompt and sampling."""

    file: FilePath | None = None
    """A text with {question}, {answer_a} and {answer_b} that asks for a verdict of [[A]], [[B]] or [[C]];
    default: the one that comes with the package."""
    max_tokens: int = 512
    """Length limit of a reply."""
    temperature: float = 0.0
    """Of the judge."""

    def text(self) -> str:
        """The rubric.

        Raises:
            ConfigError: the file is missing, or lacks a placeholder.
        """
        if self.file is None:
            return (resources.files("stillhouse.evaluate") / "rubrics" / "pairwise.txt").read_text("utf-8")
        try:
            text = Path(self.file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(Fault("--rubric", f"{self.file} cannot be read ({error})")) from error
        missing = [f"{{{name}}}" for name in PLACEHOLDERS if f"{{{name}}}" not in text]
        if missing:
            raise ConfigError(Fault("--rubric", f"{self.file} has no place for {', '.join(missing)}"))
        return text


def fill_rubric(rubric: str, question: str, answer_a: str, answer_b: str) -> str:
    """The rubric with its placeholders replaced; braces inside the texts stay as they are.

    Verdicts and tags inside the texts are defused, `[[A]]` to `[A]` and `</answer_a>` to `[/answer_a]`: an
    answer cannot end itself, and a judge that quotes it gives no verdict.
    """
    texts = (
        _MARKUP.sub(lambda match: f"[{match[1] or match[2]}]", text)
        for text in (question, answer_a, answer_b)
    )
    values = dict(zip(PLACEHOLDERS, texts, strict=True))
    return _PLACEHOLDER.sub(lambda match: values[match[1]], rubric)


def has_markup(pair: AnswerPair) -> bool:
    """Whether `fill_rubric` has to defuse a text of the pair."""
    return any(_MARKUP.search(text) for text in (pair.question, pair.first, pair.second))


def parse_verdict(reply: str) -> Verdict | None:
    """The verdict of a reply: [[A]], [[B]] or [[C]].

    None if there is none, or there are different ones: a judge that contradicts itself has not decided.
    """
    found = set(_VERDICT.findall(reply))
    return found.pop() if len(found) == 1 else None


def judge_pairs(
    pairs: Sequence[AnswerPair],
    client: Client,
    model: str,
    rubric: Rubric,
    replies: Journal,
    on_reply: Callable[[int], object] = lambda count: None,
) -> list[JudgedPair]:
    """Have all pairs judged in both orders.

    Args:
        pairs: what to judge.
        client: of the judge's server.
        model: the judge's name at the server.
        rubric: prompt and sampling.
        replies: replies so far; a request that has one is not sent again.
        on_reply: called with the number of replies that have come in.

    Raises:
        DataError: an image has changed since its row was read.
        ServerError: the server failed or rejected a request.
    """
    text = rubric.text()
    asked: dict[str, tuple[str, tuple[ImageRef, ...]]] = {}
    keys: list[tuple[str, str]] = []
    for pair in pairs:
        question, first, second = _with_places(pair)
        original = fill_rubric(text, question, first, second)
        swapped = fill_rubric(text, question, second, first)
        shown = [(filled, pair.images) for filled in (original, swapped)]
        digests = [image.digest for image in pair.images]
        bodies = [_request_body(model, rubric, _content(filled, digests)) for filled in (original, swapped)]
        keys.append((content_digest(bodies[0]), content_digest(bodies[1])))
        asked |= zip(keys[-1], shown, strict=True)
    pending = [key for key in asked if replies.get(key) is None]
    on_reply(len(asked) - len(pending))
    size = _IMAGE_REQUESTS if any(asked[key][1] for key in pending) else max(1, len(pending))
    for start in range(0, len(pending), size):
        block = {key: asked[key] for key in pending[start : start + size]}
        _ask(client, model, rubric, block, replies, on_reply)
    judged = []
    for pair, both in zip(pairs, keys, strict=True):
        found: list[dict[str, Any]] = [replies.get(key) or {} for key in both]
        texts = (found[0]["reply"], found[1]["reply"])
        verdicts = (parse_verdict(texts[0]), parse_verdict(texts[1]))
        tokens = [sum(reply[name] for reply in found) for name in ("prompt_tokens", "completion_tokens")]
        score = pair_score(*verdicts)
        judged.append(JudgedPair(pair.id, verdicts, score, tokens[0], tokens[1], texts))
    return judged


def _ask(
    client: Client,
    model: str,
    rubric: Rubric,
    asked: Mapping[str, tuple[str, tuple[ImageRef, ...]]],
    replies: Journal,
    on_reply: Callable[[int], object],
) -> None:
    """Send the filled rubrics with their images, by the keys of their replies."""
    keys = list(asked)
    bodies = [
        _request_body(model, rubric, _content(filled, [image.data_url() for image in images]))
        for filled, images in asked.values()
    ]
    try:
        for index, reply in client.request_many("chat/completions", bodies, _parse_reply):
            replies.put(keys[index], reply)
            on_reply(1)
    except ServerError as error:
        if not any(images for _, images in asked.values()):
            raise
        raise type(error)(
            f"{error} The questions show images, which only a judge that is a vision-language model reads."
        ) from error


def _with_places(pair: AnswerPair) -> tuple[str, str, str]:
    """The question with `IMAGE` where each of its images stands, and both answers."""
    if not pair.images:
        return pair.question, pair.first, pair.second
    question, first, second = map(without_images, (pair.question, pair.first, pair.second))
    if question.count(IMAGE_MARK) == len(pair.images):
        return question.replace(IMAGE_MARK, IMAGE), first, second
    return IMAGE * len(pair.images) + question, first, second


def _content(filled: str, urls: Sequence[str]) -> str | list[dict[str, Any]]:
    """The content of the judge's turn: a text, or OpenAI's content parts with each image where it stands."""
    if not urls:
        return filled
    first, *rest = filled.split(IMAGE)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for url, text in zip(cycle(urls), rest, strict=False):  # a rubric may show the question twice
        parts += [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]


def _request_body(model: str, rubric: Rubric, content: str | list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": rubric.temperature,
        "max_tokens": rubric.max_tokens,
    }


def _parse_reply(reply: Any) -> dict[str, Any]:
    usage = reply.get("usage") or {}
    content = only_choice(reply)["message"]["content"]
    return {
        "reply": checked_text("" if content is None else content, "choices[0].message.content"),
        "prompt_tokens": int(usage.get("prompt_tokens") or 0),
        "completion_tokens": int(usage.get("completion_tokens") or 0),
    }


def pair_score(original: Verdict | None, swapped: Verdict | None) -> float | None:
    """The first system's score from both orders: 1, 3/4, 1/2, 1/4 or 0."""
    if original is None or swapped is None:
        return None
    return ({"A": 1.0, "B": 0.0, "C": 0.5}[original] + {"A": 0.0, "B": 1.0, "C": 0.5}[swapped]) / 2


def win_rate_metrics(judged: Sequence[JudgedPair]) -> dict[str, float]:
    """Win rate and statistics of the verdicts.

    - `win_rate`: the mean score of the first system, a tie counting half; `win_rate_low` and `_high` are its
      95 % confidence interval (`wilson_interval`)
    - `wins`, `ties`, `losses`: pairs with a score above, at and below 1/2
    - `first_position_rate`: share of the verdicts for an answer that went to the one in first position; 1/2
      for a judge without position bias
    - `consistency`: share of pairs with the same verdict in both orders
    - `unparsable`: replies without a clear verdict; their pairs take no part in anything but this

    Raises:
        DataError: no pair has two clear verdicts.
    """
    clear = [pair for pair in judged if pair.score is not None]
    scores = [pair.score for pair in clear if pair.score is not None]
    unparsable = sum(verdict is None for pair in judged for verdict in pair.verdicts)
    if not scores:
        raise DataError(
            f"judge: none of {len(judged)} pairs has a clear verdict in both orders ({unparsable} replies "
            "without one). The judge may be too small, its replies cut (--max-tokens), or the rubric unclear."
        )
    low, high = wilson_interval(scores)
    decided = [verdict for pair in clear for verdict in pair.verdicts if verdict != "C"]
    consistent = {("A", "B"), ("B", "A"), ("C", "C")}
    return {
        "win_rate": statistics.fmean(scores),
        "win_rate_low": low,
        "win_rate_high": high,
        "wins": sum(score > 0.5 for score in scores),
        "ties": sum(score == 0.5 for score in scores),
        "losses": sum(score < 0.5 for score in scores),
        "pairs": len(scores),
        "unparsable": unparsable,
        "first_position_rate": decided.count("A") / len(decided) if decided else 0.5,
        "consistency": statistics.fmean(pair.verdicts in consistent for pair in clear),
    }


def wilson_interval(scores: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a mean of scores between 0 and 1.

    With mean p of n scores and the normal quantile z its ends solve |p - x| = z sqrt(x (1 - x) / n). Unlike
    the bootstrap's it holds for few pairs and for a mean of 0 or 1. Scores strictly between 0 and 1, such
    as ties, vary less than it assumes, so that it is then slightly too wide, never too narrow.

    Source: Wilson (1927), "Probable Inference, the Law of Succession, and Statistical Inference".

    Args:
        scores: one for each pair.
        confidence: share of such intervals that hold the true mean.
    """
    count, mean = len(scores), statistics.fmean(scores)
    z2 = statistics.NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half_width = math.sqrt(z2 * (mean * (1 - mean) / count + z2 / (4 * count * count))) / (1 + z2 / count)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
