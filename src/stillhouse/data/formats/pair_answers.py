"""The two answers of a preference pair: read alike, to the same prompt, and not the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from stillhouse.data.formats.conversation import Answers, check_completion
from stillhouse.data.formats.prompt_fields import read_answers
from stillhouse.data.formats.turns import is_turn, read_messages
from stillhouse.data.formats.values import RawRow, as_list, is_blank, wrong_type
from stillhouse.data.rows import Fields, Message, Row
from stillhouse.errors import RowError

SCORES = ("score_{}", "{}_score", "{}-score", "rating_{}", "{}_rating", "{}-rating")
"""What the scores of the two answers are called in files."""


@dataclass(frozen=True, slots=True)
class PairAnswers:
    """Both answers, and the turns that come before either.

    Example: `PairAnswers((), Answers(texts=("Fig",)), Answers(texts=("Carrot",)))`
    """

    before: tuple[Message, ...]
    chosen: Answers
    rejected: Answers

    @property
    def has_question(self) -> bool:
        """Whether the turns before hold what is answered."""
        return any(turn["role"] == "user" for turn in self.before)


def read_pair(raw: RawRow, names: tuple[str, str], location: str) -> PairAnswers:
    """Both answers of a row, each a text, the turns of the answer, or a whole conversation.

    Of two whole conversations the prompt is their common beginning, and each answer all that follows it.

    Args:
        raw: the row.
        names: the fields of the chosen and of the rejected answer.
        location: file and line.

    Raises:
        RowError: one is missing or blank, both are the same, or they answer different prompts.
    """
    sides = [_read_side(raw, name, location) for name in names]
    whole = [turns for turns, _ in sides]
    if whole[0] and whole[1]:
        pair = split_pair(whole[0], whole[1], location)
    else:
        asked = [turns[:-1] for turns in whole if turns]
        answers = [Answers(turns=turns[-1:]) if turns else found for turns, found in sides]
        leading = [_leading_system(found) for found in answers]
        if not asked and leading[1] and leading[0] != leading[1]:
            raise _different_prompts(location)
        before = asked[0] if asked else leading[0]
        pair = PairAnswers(before, *map(_without_system, answers))
    for name, side in ((names[0], pair.chosen), (names[1], pair.rejected)):
        if not side.of() or (not side.turns and not side.texts):
            raise RowError(
                location, f"field {name!r} is blank, and a preference pair needs both", "half a pair"
            )
    check_different(pair.chosen, pair.rejected, names, location)
    return pair


def split_pair(chosen: Sequence[Message], rejected: Sequence[Message], location: str) -> PairAnswers:
    """Two whole conversations: their common beginning, and what follows it in each.

    Raises:
        RowError: they have no question in common.
    """
    pairs = zip(chosen, rejected, strict=False)
    common = len(list(takewhile(lambda pair: _said(pair[0]) == _said(pair[1]), pairs)))
    common = min(common, len(chosen) - 1, len(rejected) - 1)
    while common and chosen[common - 1]["role"] == "assistant":
        common -= 1
    before = tuple(chosen[:common])
    if not any(turn["role"] == "user" for turn in before) or before[-1]["role"] == "system":
        raise _different_prompts(location)
    rest = (Answers(turns=tuple(turns[common:])) for turns in (chosen, rejected))
    found = PairAnswers(before, *rest)
    if any(answers.turns[0]["role"] != "assistant" for answers in (found.chosen, found.rejected)):
        raise _different_prompts(location)
    return found


def check_different(chosen: Answers, rejected: Answers, names: Sequence[str], location: str) -> None:
    """Refuse a pair of the same answers, which teaches nothing.

    Raises:
        RowError: they are the same but for blanks around them.
    """
    if _content(chosen) == _content(rejected):
        raise RowError(location, f"{' and '.join(map(repr, names))} are the same", "chosen equals rejected")


def with_rejected(row: Row, rejected: Answers) -> Row:
    """The row with its rejected answer."""
    found = rejected.of()
    return replace(row, rejected=found["response"], rejected_completion=found.get("completion", ()))


def margin_of(raw: RawRow, location: str) -> dict[str, float]:
    """The fact `margin`: by how much the chosen answer is better, where the row says it; else nothing.

    It is the field `margin`, or the difference of two scores such as `score_chosen` and `score_rejected`.

    Raises:
        RowError: it is no number, or the rejected answer has the higher score.
    """
    margin: float | None = None
    if not is_blank(raw.get("margin")):
        margin = read_score(raw["margin"], "margin", location)
    else:
        for form in SCORES:
            names = [form.format(side) for side in ("chosen", "rejected")]
            if not any(is_blank(raw.get(name)) for name in names):
                better, worse = (read_score(raw[name], name, location) for name in names)
                margin = better - worse
                break
    if margin is None:
        return {}
    if margin < 0:
        raise RowError(
            location,
            f"the rejected answer is scored higher than the chosen one, by {-margin:g}; swap them, or leave "
            "the scores out",
            "rejected scored above chosen",
        )
    return {"margin": margin}


def read_score(value: Any, name: str, location: str) -> float:
    """A finite number, which tables may have as text.

    Raises:
        RowError: it is none.
    """
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise wrong_type(value, name, location, "a number")
    return score


def _read_side(raw: RawRow, name: str, location: str) -> tuple[tuple[Message, ...] | None, Answers]:
    """One answer: a whole conversation, or the answer alone."""
    if is_blank(raw.get(name)):
        raise RowError(
            location, f"field {name!r} is missing or blank, and a preference pair needs both", "half a pair"
        )
    value = as_list(raw[name])
    value = [value] if is_turn(value) else value
    if not (isinstance(value, list) and all(map(is_turn, value))):
        answers = read_answers({name: raw[name]}, Fields(), location, (name,))
        return None, answers
    turns = read_messages(value, name, location)
    check_completion(turns, name, location)
    first = next((turn for turn in turns if turn["role"] != "system"), turns[-1])
    return (turns, Answers()) if first["role"] == "user" else (None, Answers(turns=turns))


def _leading_system(answers: Answers) -> tuple[Message, ...]:
    return tuple(takewhile(lambda turn: turn["role"] == "system", answers.turns))


def _without_system(answers: Answers) -> Answers:
    return replace(answers, turns=answers.turns[len(_leading_system(answers)) :])


def _said(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn without what does not change what is said."""
    kept = {name: value for name, value in turn.items() if name != "weight"}
    return {**kept, "content": turn["content"].strip()}


def _content(answers: Answers) -> Any:
    if answers.turns:
        return [_said(turn) for turn in answers.turns]
    return [{"role": "assistant", "content": answers.texts[0].strip()}]


def _different_prompts(location: str) -> RowError:
    return RowError(
        location, "'chosen' and 'rejected' answer different prompts", "chosen and rejected of two prompts"
    )
