"""The log-probabilities of given text, taken out of the two kinds of answer in which servers give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from stillhouse.remote.written import TOKEN_ID

How = Literal["prompt_logprobs", "echo"]
Scores = Sequence[Mapping[int, float]]
"""For each place of a text: token id -> log-probability (nats), of the most probable tokens and the one that
stands there. Empty for the first, which nothing predicts."""


def scores_of(choice: Mapping[str, Any], how: How) -> Scores:
    """The scores in one choice of a /v1/completions answer.

    Raises:
        KeyError, TypeError, ValueError: the answer is not whole.
    """
    if how == "prompt_logprobs":
        return [_entries(place) for place in choice["prompt_logprobs"]]
    found = choice["logprobs"]
    tokens = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    return [{} if value is None else _row({token: value, **(top or {})}) for token, value, top in tokens]


def _entries(place: Mapping[str, Mapping[str, float]] | None) -> dict[int, float]:
    return {int(token): _logprob(entry["logprob"]) for token, entry in (place or {}).items()}


def _row(entries: Mapping[str, float]) -> dict[int, float]:
    return {_id(token): _logprob(value) for token, value in entries.items()}


def _logprob(value: Any) -> float:
    number = float(value)
    if not number < 0.01:  # rounding; NaN too is no answer to keep
        raise ValueError(f"{value!r} is no log-probability")
    return number


def _id(token: str) -> int:
    if not token.startswith(TOKEN_ID):
        raise ValueError(f"{token!r} is no token id")
    return int(token.removeprefix(TOKEN_ID))
