"""Preference pairs."""

from __future__ import annotations

import re
from typing import Any

from stillhouse.data.formats.base import RawRow, RowFormat, register
from stillhouse.data.formats.conversation import check_completion, conversation_row
from stillhouse.data.formats.pair_answers import (
    check_different,
    margin_of,
    read_pair,
    split_pair,
    with_rejected,
)
from stillhouse.data.formats.prompt_fields import RESPONSE_FIELDS, PromptParts, is_detected
from stillhouse.data.formats.turns import holds_turns, is_turn, read_messages
from stillhouse.data.formats.values import as_list, first_filled, is_blank, other_fields, read_string
from stillhouse.data.rows import Fields, Message, Row
from stillhouse.errors import RowError

_QUESTION_FIELDS = ("prompt", "instruction", "question", "query", "messages", "conversations", "conversation")
_SPEAKERS = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \t]*")


@register
class PreferenceFormat(RowFormat):
    """A preference pair: a prompt with a chosen and a rejected response, each a text, the turns of the
    response, or a whole conversation. Without a prompt in a field of its own, it is the common beginning of
    the two conversations. The difference of two scores is the fact `margin`."""

    name = "prompt/chosen/rejected"
    precedence = 8
    reads = (
        "`prompt` (or `instruction`, `question`, `query`, `messages`, `conversations`), `chosen`, "
        "`rejected`, `input`, `system`, `history`, `tools`, `margin` (or `score_chosen` and "
        "`score_rejected`, also `rating`)"
    )
    example = '{"prompt": "A fruit?", "chosen": "Fig", "rejected": "Carrot", "margin": 2}'
    parsed = Row(
        "example",
        instruction="A fruit?",
        response="Fig",
        references=("Fig",),
        rejected="Carrot",
        extra={"margin": 2.0},
    )

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        if fields.rejected is not None:
            return fields.messages is None and fields.text is None
        if not is_detected(fields) or not _is_pair(raw):
            return False
        return _question_field(raw) is not None or any(
            holds_turns(raw.get(name)) for name in ("chosen", "rejected")
        )

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        names = (fields.response or "chosen", fields.rejected or "rejected")
        question = fields.prompt or _question_field(raw)
        if question is not None and raw[question] == raw.get(names[0]):
            question = None  # the chosen conversation once more
        parts = PromptParts.read(raw, fields, location, question)
        pair = read_pair(raw, names, location)
        answers = parts.with_reasoning(pair.chosen, location)
        if not pair.has_question and question is None:
            raise RowError(
                location,
                "has no prompt: neither a field of its own nor a turn of the user in 'chosen'",
                "no prompt",
            )
        used = (*names, question, *parts.fields)
        extra = {**other_fields(raw, *used), **margin_of(raw, location)}
        asked = _question(raw[question], question, parts.input, location) if question else ()
        if pair.has_question:
            _check_same_prompt(asked, pair.before, location)
            context = pair.before
        else:
            context = (*pair.before, *asked)
        plain = not (pair.before or parts.system or parts.history or parts.tools)
        if plain and question and isinstance(raw[question], str) and not _are_turns(raw[question]):
            row = Row(location, str(raw[question]), parts.input, extra=extra, **answers.of())
        else:
            turns = parts.around(context, location)
            row = conversation_row(location, turns, answers, parts.tools, extra)
        return with_rejected(row, pair.rejected)


@register
class DialoguePairFormat(RowFormat):
    """A preference pair of whole dialogues as texts of "Human:" and "Assistant:" turns, as in Anthropic's HH.
    Their common beginning is the prompt, what follows in each is its response."""

    name = "chosen/rejected"
    precedence = 9
    reads = "`chosen`, `rejected`, `system`, `margin`"
    example = (
        '{"chosen": "\\n\\nHuman: A fruit?\\n\\nAssistant: Fig", '
        '"rejected": "\\n\\nHuman: A fruit?\\n\\nAssistant: Carrot"}'
    )
    parsed = Row(
        "example",
        messages=({"role": "user", "content": "A fruit?"},),
        response="Fig",
        references=("Fig",),
        rejected="Carrot",
    )

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return is_detected(fields) and _is_pair(raw) and _question_field(raw) is None

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        parts = PromptParts.read(raw, fields, location, None, input_fields=())
        sides = (self._turns(raw, "chosen", location), self._turns(raw, "rejected", location))
        pair = split_pair(*sides, location)
        check_different(pair.chosen, pair.rejected, ("chosen", "rejected"), location)
        answers = parts.with_reasoning(pair.chosen, location)
        extra = {**other_fields(raw, "chosen", "rejected", *parts.fields), **margin_of(raw, location)}
        context = parts.around(pair.before, location)
        row = conversation_row(location, context, answers, parts.tools, extra)
        return with_rejected(row, pair.rejected)

    def _turns(self, raw: RawRow, name: str, location: str) -> tuple[Message, ...]:
        if is_blank(raw.get(name)):
            raise RowError(
                location,
                f"field {name!r} is missing or blank, and a preference pair needs both",
                "half a pair",
            )
        turns = dialogue_turns(raw[name]) if isinstance(raw[name], str) else None
        if turns is None:
            raise RowError(
                location,
                f"has no prompt, and {name!r} is no dialogue of Human: and Assistant:; name the fields: "
                "fields: {prompt: ..., response: chosen, rejected: rejected}",
                "no prompt",
            )
        check_completion(turns, name, location)
        if not turns[-1]["content"].strip():
            raise RowError(location, f"the last turn of {name!r} is blank", "half a pair")
        return turns


def dialogue_turns(text: str) -> tuple[Message, ...] | None:
    """The turns of a text of "Human:" and "Assistant:" paragraphs; None if it is none."""
    pieces = _SPEAKERS.split(text)
    if len(pieces) < 3 or pieces[0].strip() or pieces[1] != "Human":
        return None
    roles = ("user" if speaker == "Human" else "assistant" for speaker in pieces[1::2])
    return tuple(
        {"role": role, "content": content.strip()} for role, content in zip(roles, pieces[2::2], strict=True)
    )


def _is_pair(raw: RawRow) -> bool:
    """Whether a row has both answers, or one of them and no other response."""
    present = [name for name in ("chosen", "rejected") if name in raw]
    said = [name for name in present if isinstance(raw[name], str | list) or is_turn(as_list(raw[name]))]
    if len(present) == 2:
        return bool(said)
    return bool(said) and first_filled(raw, RESPONSE_FIELDS) is None


def _question_field(raw: RawRow) -> str | None:
    return next((name for name in _QUESTION_FIELDS if not is_blank(raw.get(name))), None)


def _are_turns(value: Any) -> bool:
    turns = as_list(value)
    return isinstance(turns, list) and bool(turns) and all(map(is_turn, turns))


def _question(value: Any, name: str, given: str, location: str) -> tuple[Message, ...]:
    if _are_turns(value):
        return read_messages(value, name, location)
    content = "\n\n".join(filter(None, (read_string(value, name, location), given)))
    return ({"role": "user", "content": content},)


def _check_same_prompt(asked: tuple[Message, ...], before: tuple[Message, ...], location: str) -> None:
    """Refuse a prompt that is not what the turns of `chosen` answer."""
    texts = [turn["content"].strip() for turn in before]
    missing = [turn for turn in asked if turn["content"].strip() not in texts]
    if missing:
        raise RowError(
            location,
            "the prompt is not among the turns of 'chosen', which have another question",
            "two different prompts",
        )
