"""What a server may answer to what it was asked: checked before anything is trained on, cached or saved.

A server may be another model than the one named, may cut or shift what it was sent, or may be broken. Each
function raises `InvalidAnswer` with the field that is wrong; the client adds server and request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ROUNDING = 0.01
"""What rounding in a server may add to a log-probability of 0, and to a probability mass of 1."""
ZERO_PROBABILITY = -9999.0
"""JSON has no infinity: vLLM writes a probability of 0 as this log-probability."""
PADDING_ROWS, PADDING_LOGPROB = 1024, -9.0
"""Heads are padded by up to so many rows that stand for no token; an id there with a log-probability below
this is no other vocabulary, and counts as part of the tail."""


class InvalidAnswer(Exception):
    """An answer is not one to what was asked. A retry is not made: the server means what it says.

    Example: `InvalidAnswer("choices[0].token_ids[3]", "is 999999; the tokenizer has ids 0 to 511")`
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")


def only_choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one choice of a response.

    Raises:
        KeyError, TypeError, IndexError: there is none.
        InvalidAnswer: there are several, and one was asked for.
    """
    choices = reply["choices"]
    if isinstance(choices, list) and len(choices) > 1:
        raise InvalidAnswer("choices", f"has {len(choices)} choices, and one was asked for")
    choice: Mapping[str, Any] = choices[0]
    return choice


def checked_text(value: Any, field: str) -> str:
    """Text that a file can hold: a string without half a character.

    Raises:
        InvalidAnswer: it is neither.
    """
    if not isinstance(value, str):
        raise InvalidAnswer(field, f"is {_shown(value)}, not text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidAnswer(field, "holds half a character (a lone surrogate)")
    return value


def checked_ids(values: Any, field: str, vocab: int | None, most: int | None = None) -> tuple[int, ...]:
    """Token ids of the vocabulary.

    Args:
        values: what the server sent.
        field: its place in the answer.
        vocab: ids are below it; None: unknown.
        most: how many were asked for at most; None: any number.

    Raises:
        InvalidAnswer: not a list of such ids.
    """
    if not isinstance(values, list):
        raise InvalidAnswer(field, f"is {_shown(values)}, not a list of token ids")
    if most is not None and len(values) > most:
        raise InvalidAnswer(field, f"has {len(values)} tokens, and at most {most} were asked for")
    for place, value in enumerate(values):
        if type(value) is not int or value < 0 or (vocab is not None and value >= vocab):
            raise InvalidAnswer(f"{field}[{place}]", f"is {_shown(value)}, {_allowed_ids(vocab)}")
    return tuple(values)


def checked_logprob(value: Any, field: str) -> float:
    """A log-probability in nats, at most 0; -inf for a probability of 0.

    Raises:
        InvalidAnswer: it is none.
    """
    if type(value) not in (float, int) or not value <= ROUNDING:  # NaN compares as false
        raise InvalidAnswer(field, f"{_shown(value)} is no log-probability")
    return min(0.0, float(value))


def checked_sampled_logprobs(values: Any, field: str, count: int) -> tuple[float, ...]:
    """The log-probabilities of `count` sampled tokens, none of which can have had a probability of 0.

    Raises:
        InvalidAnswer: there are more or fewer, or one is no log-probability.
    """
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, list) else _shown(values)
        raise InvalidAnswer(field, f"has {got} for {count} tokens")
    found = tuple(checked_logprob(value, f"{field}[{place}]") for place, value in enumerate(values))
    if -math.inf in found:
        raise InvalidAnswer(f"{field}[{found.index(-math.inf)}]", "is -inf for a token that was sampled")
    return found


def check_sent_back(reply: Mapping[str, Any], prompt: Any) -> None:
    """Compare what an answer says about its prompt with the token ids that were sent.

    Raises:
        InvalidAnswer: other ids, another number of them, or cut.
    """
    if not isinstance(prompt, list):
        return
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    for field, holder in (("choices[0].prompt_token_ids", choice), ("prompt_token_ids", reply)):
        back = holder.get("prompt_token_ids") if isinstance(holder, Mapping) else None
        if back is not None and back != prompt:
            raise InvalidAnswer(field, f"{_other_ids(back, prompt)} It does not take token ids as they are")
    usage = reply.get("usage")
    counted = (usage if isinstance(usage, Mapping) else {}).get("prompt_tokens")
    if type(counted) is int and counted > 0 and counted != len(prompt):
        raise InvalidAnswer("usage.prompt_tokens", f"is {counted}, and {len(prompt)} token ids were sent")
    if reply.get("truncated") is True:
        raise InvalidAnswer("truncated", "the prompt was cut to the server's context")


def checked_position(
    entries: Sequence[tuple[int, Any]], field: str, k: int, vocab: int | None
) -> dict[int, float]:
    """Token id -> log-probability at one position, of the `k` most probable tokens and the text's own.

    Padding rows of the head are left out: their mass is in the tail.

    Args:
        entries: ids and values as the server sent them.
        field: the position's place in the answer.
        k: how many were asked for.
        vocab: ids are below it; None: unknown.

    Raises:
        InvalidAnswer: an id is not in the vocabulary or comes twice, a value is no log-probability, there are
            more or fewer entries than were asked for, or their probabilities sum to more than 1.
    """
    if not min(k, vocab or k) <= len(entries) <= k + 1:
        way_out = "" if len(entries) > k else f"; lower k, or start vLLM with --max-logprobs {k}"
        raise InvalidAnswer(field, f"has {len(entries)} tokens, and {k} (or {k + 1}) were asked for{way_out}")
    found: dict[int, float] = {}
    for token, value in entries:
        logprob = checked_logprob(value, f"{field}, token {token}")
        if token in found:
            raise InvalidAnswer(field, f"has token {token} twice")
        if token < 0 or (vocab is not None and token >= vocab):
            padding = vocab is not None and vocab <= token < vocab + PADDING_ROWS
            if not (padding and logprob < PADDING_LOGPROB):
                raise InvalidAnswer(field, f"has token {token}, {_allowed_ids(vocab)}")
            continue
        found[token] = logprob
    mass = math.fsum(map(math.exp, found.values()))
    if mass > 1.0 + ROUNDING:
        raise InvalidAnswer(field, f"has probabilities that sum to {mass:.4g}, more than 1")
    return found


def check_whole_text(positions: Sequence[Mapping[int, float]], sequence: Sequence[int], field: str) -> None:
    """Compare the positions of an answer with the token ids that were sent.

    Raises:
        InvalidAnswer: another number of positions; values for another text; or values shifted by one.
    """
    if len(positions) != len(sequence):
        raise InvalidAnswer(
            field,
            f"has {len(positions)} positions for {len(sequence)} tokens; the server cut the sequence or "
            "tokenised it anew",
        )
    if positions and positions[0]:
        raise InvalidAnswer(f"{field}[0]", "has values, although nothing predicts the first token")
    for place, (token, row) in enumerate(zip(sequence, positions, strict=True)):
        if place and token not in row:
            raise InvalidAnswer(
                f"{field}[{place}]",
                f"leaves out token {token}, although it stands there: the server does not take token ids as "
                "they are, or shifted its values",
            )


def answer_limit(body: Mapping[str, Any] | None) -> int:
    """The most bytes that an honest answer to a request may have.

    Servers repeat the prompt and its settings; a token takes its text, its numbers and those of the
    alternatives that were asked for, each in at most a kibibyte.
    """
    if body is None:
        return 32 << 20  # the models of a hosted server
    prompt = body.get("prompt")
    positions = len(prompt) if isinstance(prompt, list | str) else 0
    written = body.get("max_tokens")
    tokens = written if isinstance(written, int) else 65_536
    shown = max((body[name] for name in ("logprobs", "n_probs") if type(body.get(name)) is int), default=0)
    in_prompt = body.get("prompt_logprobs")
    scores = [one for one in (in_prompt, shown if body.get("echo") else None) if isinstance(one, int)]
    sent = sum(len(str(value)) for value in body.values())
    return (4 << 20) + 16 * sent + 1024 * (tokens * (shown + 2) + positions * sum(one + 2 for one in scores))


def _allowed_ids(vocab: int | None) -> str:
    return "no token id" if vocab is None else f"and the tokenizer has ids 0 to {vocab - 1}"


def _other_ids(back: Any, prompt: Sequence[int]) -> str:
    if not isinstance(back, list):
        return f"is {_shown(back)}, not the ids that were sent."
    if len(back) != len(prompt):
        return f"has {len(back)} ids, and {len(prompt)} were sent."
    place = next(place for place, (a, b) in enumerate(zip(back, prompt, strict=True)) if a != b)
    return f"has {_shown(back[place])} at {place}, where {prompt[place]} was sent."


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge integer"
    return text if len(text) <= 60 else f"{text[:57]}..."
