"""Log-probabilities that another program has written down: rows of a file, checked, as a sparse signal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stillhouse.core.sparse import EXCLUDED, MIN_TAIL, SparseLogprobs
from stillhouse.errors import RowError
from stillhouse.remote.answers import InvalidAnswer, checked_ids, checked_logprob, checked_position

PROMPT_IDS = ("prompt_token_ids", "prompt_ids")
RESPONSE_IDS = ("token_ids", "response_token_ids", "response_ids", "output_ids")
TEXTS = ("text", "response", "output")
TOP_IDS = ("topk_ids", "top_ids", "teacher_ids", "logprob_ids")
TOP_LOGPROBS = ("topk_logprobs", "top_logprobs", "teacher_logprobs", "logprob_values")
OWN_LOGPROBS = ("token_logprobs", "label_logprobs")
"""Columns that are understood, in the order in which they are looked for."""

Entries = Mapping[int, float]
"""Token id -> log-probability at one position."""


@dataclass(frozen=True, slots=True)
class RecordedText:
    """One text of a file: its tokens, and what the teacher said at each token of the response."""

    prompt_ids: tuple[int, ...] | None
    """None where the file has no prompt as ids."""
    response_ids: tuple[int, ...] | None
    positions: tuple[Entries, ...]
    """One for each response token."""
    own: tuple[float | None, ...]
    """The log-probability of each response token; None where the file does not say."""
    text: str | None = None
    """The response as text."""
    decoded: frozenset[tuple[int, str]] = frozenset()
    """Tokens and their texts, as the file has them."""


def recorded_text(row: Mapping[str, Any], location: str, vocab: int) -> RecordedText:
    """A row of a file, in any of the forms that are understood.

    vLLM's own (`prompt_token_ids`, `token_ids`, `logprobs` or `prompt_logprobs` as {id: {logprob, rank,
    decoded_token}}), whole answers of its server (`choices`) and of `LLM.generate` (`outputs`), or columns of
    ids and log-probabilities for each position.

    Raises:
        RowError: the row is none of these, or its numbers cannot be log-probabilities of these tokens.
    """
    inner: Any = next((row[name][0] for name in ("choices", "outputs") if row.get(name)), {})
    whole = {**row, **inner} if isinstance(inner, Mapping) else dict(row)
    try:
        return _recorded(whole, vocab)
    except InvalidAnswer as error:
        raise RowError(location, str(error), _reason(str(error))) from error
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RowError(
            location, f"is no row of log-probabilities ({error})", "not log-probabilities"
        ) from error


def _recorded(row: Mapping[str, Any], vocab: int) -> RecordedText:
    prompt, response = (_ids(row, names, vocab) for names in (PROMPT_IDS, RESPONSE_IDS))
    decoded: set[tuple[int, str]] = set()
    if row.get("logprobs"):
        found = _dictionaries(row["logprobs"], "logprobs", vocab, decoded)
    elif row.get("prompt_logprobs"):
        prompt, response, found = _of_a_prompt(row, prompt, response, vocab, decoded)
    else:
        found = _columns(row, vocab)
    if response is not None and len(found) != len(response):
        raise InvalidAnswer("logprobs", f"has {len(found)} positions for {len(response)} response tokens")
    if decoded and response is not None:  # vLLM's always hold the text's own token
        _check_own_tokens(response, found)
    own = _own(row, response, found)
    text = next((row[name] for name in TEXTS if isinstance(row.get(name), str)), None)
    return RecordedText(prompt, response, tuple(found), own, text, frozenset(decoded))


def _check_own_tokens(response: Sequence[int], found: Sequence[Entries]) -> None:
    at = {
        shift: sum(
            token in found[place + shift]
            for place, token in enumerate(response)
            if 0 <= place + shift < len(found)
        )
        for shift in (-1, 0, 1)
    }
    if at[0] == len(response):
        return
    place = next(place for place, token in enumerate(response) if token not in found[place])
    if max(at[-1], at[1]) >= max(at[0] + 1, len(response) - 1):
        raise InvalidAnswer("logprobs", "are shifted by one against the response tokens")
    raise InvalidAnswer(f"logprobs[{place}]", f"leaves out token {response[place]}, which stands there")


def _ids(row: Mapping[str, Any], names: Sequence[str], vocab: int) -> tuple[int, ...] | None:
    name = next((name for name in names if row.get(name) is not None), None)
    return None if name is None else checked_ids(row[name], name, vocab)


def _of_a_prompt(
    row: Mapping[str, Any], prompt: Any, response: Any, vocab: int, decoded: set[tuple[int, str]]
) -> tuple[tuple[int, ...], tuple[int, ...], list[Entries]]:
    """Prompt and response that were sent as one; `prompt_length` or the response says where it ends."""
    positions = row["prompt_logprobs"]
    scored = _dictionaries(positions[1:], "prompt_logprobs", vocab, decoded)
    if prompt is None:
        raise InvalidAnswer("prompt_logprobs", "needs prompt_token_ids, the tokens that they are of")
    start = row.get("prompt_length")
    if type(start) is int:
        prompt, response = prompt[:start], prompt[start:]
    elif response is not None and len(prompt) + len(response) == len(positions):
        pass
    elif response is not None and prompt[-len(response) :] == response and len(prompt) == len(positions):
        prompt = prompt[: -len(response)]
    else:
        raise InvalidAnswer(
            "prompt_logprobs", "are of a whole text; give prompt_length, the number of tokens of its prompt"
        )
    whole = (*prompt, *response)
    if len(positions) != len(whole) or not prompt or not response:
        raise InvalidAnswer("prompt_logprobs", f"has {len(positions)} positions for {len(whole)} tokens")
    return prompt, response, scored[len(prompt) - 1 :]


def _dictionaries(positions: Any, name: str, vocab: int, decoded: set[tuple[int, str]]) -> list[Entries]:
    """vLLM's {id: {logprob, rank, decoded_token}} for each position; a table has them as pairs."""
    found: list[Entries] = []
    for place, position in enumerate(positions):
        at = f"{name}[{place}]"
        pairs = list(position.items() if isinstance(position, Mapping) else position or ())
        if not pairs:
            raise InvalidAnswer(at, "has no tokens")
        entries, ranks = [], []
        for token, value in pairs:
            facts = value if isinstance(value, Mapping) else {"logprob": value}
            entries.append((int(token), facts["logprob"]))
            if facts.get("rank") is not None:
                ranks.append((facts["rank"], facts["logprob"], int(token)))
            if facts.get("decoded_token"):
                decoded.add((int(token), facts["decoded_token"]))
        _check_ranks(ranks, at)
        found.append(checked_position(entries, at, len(entries), vocab))
    return found


def _check_ranks(ranks: Sequence[tuple[Any, float, int]], at: str) -> None:
    ordered = sorted(ranks)
    for (rank, value, token), (after, lower, other) in itertools.pairwise(ordered):
        if rank < 1 or (after > rank and lower > value + 1e-6):
            raise InvalidAnswer(
                at, f"token {other} has rank {after} and is more probable than token {token} of rank {rank}"
            )


def _columns(row: Mapping[str, Any], vocab: int) -> list[Entries]:
    names = [
        next((one for one in names if row.get(one) is not None), None) for names in (TOP_IDS, TOP_LOGPROBS)
    ]
    if None in names:
        raise ValueError(
            f"it has neither logprobs nor prompt_logprobs nor columns {TOP_IDS[0]} and {TOP_LOGPROBS[0]}; it "
            f"has {', '.join(row)}"
        )
    ids, values = row[str(names[0])], row[str(names[1])]
    if len(ids) != len(values):
        raise InvalidAnswer(str(names[0]), f"has {len(ids)} positions, and {names[1]} has {len(values)}")
    found: list[Entries] = []
    for place, (tokens, logprobs) in enumerate(zip(ids, values, strict=True)):
        at = f"{names[1]}[{place}]"
        if len(tokens) != len(logprobs):
            raise InvalidAnswer(at, f"has {len(logprobs)} values for {len(tokens)} tokens")
        entries = list(zip(checked_ids(list(tokens), f"{names[0]}[{place}]", vocab), logprobs, strict=True))
        found.append(checked_position(entries, at, len(entries), vocab))
    return found


def _own(
    row: Mapping[str, Any], response: Sequence[int] | None, found: Sequence[Entries]
) -> tuple[float | None, ...]:
    name = next((one for one in OWN_LOGPROBS if row.get(one) is not None), None)
    if name is not None:
        values = row[name]
        if len(values) != len(found):
            raise InvalidAnswer(name, f"has {len(values)} values for {len(found)} response tokens")
        return tuple(checked_logprob(value, f"{name}[{n}]") for n, value in enumerate(values))
    if response is None:
        return (None,) * len(found)
    return tuple(entries.get(token) for token, entries in zip(response, found, strict=True))


REASONS = (
    ("shifted by one", "shifted by one"),
    ("leaves out token", "the text's own token is missing"),
    ("more probable than token", "ranks against log-probabilities"),
    ("sum to", "probabilities of more than 1"),
    ("is no log-probability", "no log-probability"),
    ("twice", "a token twice"),
    ("no token id", "token ids out of range"),
    ("ids 0 to", "token ids out of range"),
    (" for ", "lengths that do not match"),
)


def _reason(message: str) -> str:
    return next((reason for part, reason in REASONS if part in message), "not log-probabilities")


def check_against_tokenizer(
    found: RecordedText, decode: Callable[[Sequence[int]], str], location: str
) -> None:
    """Compare texts of the file with what its ids are in a tokenizer; spaces at the ends do not count.

    Raises:
        RowError: they differ, so the ids are another tokenizer's.
    """
    for token, text in sorted(found.decoded):
        ours = decode([token])
        if "\ufffd" not in text + ours and text.strip() and ours.strip() and text.strip() != ours.strip():
            problem = f"token {token} is {text!r} in the file and {ours!r} for the student's tokenizer"
            raise RowError(location, problem, "tokens of another tokenizer")
    if found.text is not None and found.response_ids is not None:
        ours = decode(found.response_ids)
        if "\ufffd" not in ours and ours.strip() != found.text.strip():
            problem = f"its token ids are {ours[:60]!r}, and its text is {found.text[:60]!r}"
            raise RowError(location, problem, "token ids that are not the text")


def sparse_rows(found: RecordedText, k: int) -> SparseLogprobs:
    """The `k` most probable tokens of each position, the mass of the rest, and the labels; NaN for a label of
    which nothing is known."""
    best = [sorted(one.items(), key=lambda item: -item[1])[:k] for one in found.positions]
    width = max(1, *map(len, best))
    ids = torch.tensor([[token for token, _ in row] + [-1] * (width - len(row)) for row in best])
    values = torch.tensor([[value for _, value in row] + [EXCLUDED] * (width - len(row)) for row in best])
    rest = 1.0 - values.double().exp().sum(-1)
    tail = rest.clamp_min(0.0).log().clamp_min(MIN_TAIL).float()
    labels = torch.tensor([float("nan") if one is None else one for one in found.own])
    return SparseLogprobs(ids, values, tail=tail, labels=labels)


@dataclass
class ShiftCheck:
    """Whether the positions of a file stand one place beside their tokens: a response's tokens are then found
    among the entries of the position before or after more often than at their own."""

    at: dict[int, int] = field(default_factory=lambda: {-1: 0, 0: 0, 1: 0})

    def add(self, found: RecordedText) -> None:
        """Count a text."""
        ids = found.response_ids or ()
        for place, token in enumerate(ids):
            for shift in self.at:
                if 0 <= place + shift < len(ids) and token in found.positions[place + shift]:
                    self.at[shift] += 1

    @property
    def shifted(self) -> str | None:
        """In words, what is wrong; None if the tokens are where they should be."""
        shift = max(self.at, key=lambda one: (self.at[one], one == 0))
        if shift == 0 or self.at[shift] < 1.5 * self.at[0]:
            return None
        where = "before" if shift < 0 else "after"
        return (
            f"its positions are shifted by one: the response's tokens are {self.at[shift]:,} times among the "
            f"entries of the position {where} and {self.at[0]:,} times at their own. Entry t has to be what "
            "predicts response token t"
        )
