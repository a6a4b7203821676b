"""A model as the judge of two answers: the question it gets, what its reply means, what many replies say.

Every pair is judged twice, with the answers in both orders, because judges lean to a place (Zheng et al.
2023, arXiv 2306.05685, section 3.3); DistiLLM-2 (arXiv 2503.07067) judges so, too.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stillhouse.config import FilePath, StrictConfig
from stillhouse.core.journal import Journal, content_digest
from stillhouse.errors import ConfigError, DataError, Fault

if TYPE_CHECKING:
    from stillhouse.remote.client import Client

Verdict = Literal["A", "B", "C"]
"""The first answer, the second one, or neither."""

PLACES = ("question", "answer_a", "answer_b")
_PLACE = re.compile(r"\{(question|answer_a|answer_b)\}")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_MARKS = re.compile(r"\[\[+([ABC])\]\]+|<(/?(?:question|answer_a|answer_b))>")
"""What an answer could hold to be taken for a verdict, or for the end of an answer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One question and what both systems answered.

    Example: `Pair("dolly:1", "Name a fruit.", first="Fig.", second="A fruit is ...")`
    """

    id: str
    question: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Judged:
    """What the judge said of one pair.

    Example: `Judged("dolly:1", verdicts=("A", "B"), score=1.0)` (the first system won in both orders)
    """

    id: str
    verdicts: tuple[Verdict | None, Verdict | None]
    """With the first system's answer as A, and as B; None where the reply held no verdict."""
    score: float | None
    """1 if the first system is better, 0 if the second is, 1/2 for a tie; the mean of both orders. None
    unless both replies held a verdict."""
    prompt_tokens: int = 0
    """Of both replies together, as the server counted."""
    completion_tokens: int = 0
    replies: tuple[str, str] = ("", "")
    """What the judge wrote, in both orders."""


class Rubric(StrictConfig):
    """How a judge is asked."""

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
            ConfigError: the file is missing, or has no place for the question or an answer.
        """
        if self.file is None:
            return (resources.files("stillhouse.evaluate") / "rubrics" / "pairwise.txt").read_text("utf-8")
        try:
            text = Path(self.file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(Fault("--rubric", f"{self.file} cannot be read ({error})")) from error
        missing = [name for name in PLACES if f"{{{name}}}" not in text]
        if missing:
            raise ConfigError(
                Fault("--rubric", f"{self.file} has no place for {', '.join(f'{{{m}}}' for m in missing)}")
            )
        return text


def filled(rubric: str, question: str, answer_a: str, answer_b: str) -> str:
    """The rubric with its places filled; braces inside the texts stay as they are.

    Marks of a verdict and of the rubric's parts inside the texts are broken up, `[[A]]` to `[A]` and
    `</answer_a>` to `[/answer_a]`: an answer cannot end itself, and a judge that quotes it gives no verdict.
    """
    texts = (
        _MARKS.sub(lambda mark: f"[{mark[1] or mark[2]}]", text) for text in (question, answer_a, answer_b)
    )
    values = dict(zip(PLACES, texts, strict=True))
    return _PLACE.sub(lambda match: values[match[1]], rubric)


def marked(pair: Pair) -> bool:
    """Whether a text of the pair holds marks that are broken up before the judge reads it."""
    return any(_MARKS.search(text) for text in (pair.question, pair.first, pair.second))


def verdict(reply: str) -> Verdict | None:
    """What a reply decides: [[A]], [[B]] or [[C]].

    None if it holds no verdict, or different ones: a judge that contradicts itself has not decided.
    """
    found = set(_VERDICT.findall(reply))
    return found.pop() if len(found) == 1 else None


def judge(
    pairs: Sequence[Pair],
    client: Client,
    model: str,
    rubric: Rubric,
    journal: Journal,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Judged]:
    """Have all pairs judged in both orders.

    Args:
        pairs: what to judge.
        client: of the judge's server.
        model: the judge's name at the server.
        rubric: how it is asked.
        journal: replies so far; those of equal questions are used again.
        advance: called with the number of replies that have come.
    """
    text = rubric.text()
    bodies: dict[str, dict[str, Any]] = {}
    orders: list[tuple[str, str]] = []
    for pair in pairs:
        straight = _body(model, rubric, filled(text, pair.question, pair.first, pair.second))
        turned = _body(model, rubric, filled(text, pair.question, pair.second, pair.first))
        orders.append((content_digest(straight), content_digest(turned)))
        bodies |= zip(orders[-1], (straight, turned), strict=True)
    still_open = [key for key in bodies if journal.get(key) is None]
    advance(len(bodies) - len(still_open))
    for index, reply in client.request_many("chat/completions", [bodies[key] for key in still_open], _read):
        journal.put(still_open[index], reply)
        advance(1)
    judged = []
    for pair, keys in zip(pairs, orders, strict=True):
        replies: list[dict[str, Any]] = [journal.get(key) or {} for key in keys]
        said = (replies[0]["reply"], replies[1]["reply"])
        first, second = map(verdict, said)
        tokens = [sum(reply[name] for reply in replies) for name in ("prompt_tokens", "completion_tokens")]
        judged.append(Judged(pair.id, (first, second), score(first, second), tokens[0], tokens[1], said))
    return judged


def _body(model: str, rubric: Rubric, content: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": rubric.temperature,
        "max_tokens": rubric.max_tokens,
    }


def _read(reply: Any) -> dict[str, Any]:
    usage = reply.get("usage") or {}
    return {
        "reply": str(reply["choices"][0]["message"]["content"] or ""),
        "prompt_tokens": int(usage.get("prompt_tokens") or 0),
        "completion_tokens": int(usage.get("completion_tokens") or 0),
    }


def score(straight: Verdict | None, turned: Verdict | None) -> float | None:
    """The first system's score from both orders: 1, 3/4, 1/2, 1/4 or 0."""
    if straight is None or turned is None:
        return None
    return ({"A": 1.0, "B": 0.0, "C": 0.5}[straight] + {"A": 0.0, "B": 1.0, "C": 0.5}[turned]) / 2


def summary(judged: Sequence[Judged]) -> dict[str, float]:
    """What the verdicts come to.

    - `win_rate`: the mean score of the first system, a tie counting half; `win_rate_low` and `_high` are its
      95 % confidence interval (`interval`)
    - `wins`, `ties`, `losses`: pairs with a score above, at and below 1/2
    - `first_place`: of the verdicts for one of the answers, the share for the one that stood first; 1/2 for
      a judge that does not look at the place. `consistency`: pairs with the same verdict in both orders
    - `unparsable`: replies without a clear verdict; their pairs take no part in anything but this

    Raises:
        DataError: no pair has two clear verdicts.
    """
    scores = [one.score for one in judged if one.score is not None]
    clear = [one for one in judged if one.score is not None]
    unparsable = sum(found is None for one in judged for found in one.verdicts)
    if not scores:
        raise DataError(
            f"judge: none of {len(judged)} pairs has a clear verdict in both orders ({unparsable} replies "
            "without one). The judge may be too small, its replies cut (--max-tokens), or the rubric unclear."
        )
    low, high = interval(scores)
    decided = [found for one in clear for found in one.verdicts if found != "C"]
    same = {("A", "B"), ("B", "A"), ("C", "C")}
    return {
        "win_rate": statistics.fmean(scores),
        "win_rate_low": low,
        "win_rate_high": high,
        "wins": sum(value > 0.5 for value in scores),
        "ties": sum(value == 0.5 for value in scores),
        "losses": sum(value < 0.5 for value in scores),
        "pairs": len(scores),
        "unparsable": unparsable,
        "first_place": decided.count("A") / len(decided) if decided else 0.5,
        "consistency": statistics.fmean(one.verdicts in same for one in clear),
    }


def interval(scores: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a mean of scores between 0 and 1.

    With mean p of n scores and the normal quantile z its ends solve |p - x| = z sqrt(x (1 - x) / n). It holds
    for few pairs and for a mean of 0 or 1, where the bootstrap's has no width. Scores between 0 and 1, such
    as ties, vary less than it takes for granted, so that it is then a little too wide, never too narrow.

    Source: Wilson (1927), "Probable Inference, the Law of Succession, and Statistical Inference".

    Args:
        scores: one for each pair.
        share: how often such an interval holds the true mean.
    """
    count, mean = len(scores), statistics.fmean(scores)
    z2 = statistics.NormalDist().inv_cdf((1 + share) / 2) ** 2
    middle = (mean + z2 / (2 * count)) / (1 + z2 / count)
    reach = math.sqrt(z2 * (mean * (1 - mean) / count + z2 / (4 * count * count))) / (1 + z2 / count)
    return max(0.0, middle - reach), min(1.0, middle + reach)
