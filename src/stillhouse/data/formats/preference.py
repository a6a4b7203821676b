"""Preference pairs."""

from __future__ import annotations

import re
from typing import Any

from stillhouse.data.formats.base import RawRow, RowFormat, register
from stillhouse.data.formats.conversation import (
    Answers,
    check_completion,
    conversation_row,
    split_conversation,
)
from stillhouse.data.formats.prompt_fields import PromptParts, is_detected, read_answers
from stillhouse.data.formats.turns import holds_turns, is_turn, read_messages
from stillhouse.data.formats.values import as_list, is_blank, other_fields, read_string
from stillhouse.data.rows import Fields, Message, Row
from stillhouse.errors import RowError

_QUESTION_FIELDS = ("prompt", "instruction", "question", "query")
_SPEAKERS = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \t]*")


@register
class PreferenceFormat(RowFormat):
    """A preference pair, read as a prompt with the chosen response; the rejected one and the scores are facts
    of the row. Both may be texts or lists of turns, with the prompt among them or in its own field."""

    name = "prompt/chosen/rejected"
    precedence = 15
    reads = (
        "`prompt` (or `instruction`, `question`, `query`), `chosen`, `input`, `system`, `history`, `tools`"
    )
    example = '{"prompt": "A fruit?", "chosen": "Fig", "rejected": "Carrot"}'
    parsed = Row(
        "example",
        instruction="A fruit?",
        response="Fig",
        references=("Fig",),
        extra={"rejected": "Carrot"},
    )

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        has_prompt = _question_field(raw) is not None or holds_turns(raw.get("chosen"))
        chosen = raw.get("chosen")
        pair = "rejected" in raw and (isinstance(chosen, str | list) or is_turn(chosen))
        return is_detected(fields) and pair and has_prompt

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        question = _question_field(raw)
        parts = PromptParts.read(raw, fields, location, question)
        chosen = as_list(raw["chosen"])
        before: tuple[Message, ...] = ()
        if isinstance(chosen, list) and chosen and all(map(is_turn, chosen)):
            turns = read_messages(chosen, "chosen", location)
            check_completion(turns, "chosen", location)
            first = next((n for n, turn in enumerate(turns) if turn["role"] != "system"), 0)
            if turns[first]["role"] == "user":
                before, answers = split_conversation(turns)
            else:
                before, answers = turns[:first], Answers(turns=turns[first:])
        else:
            answers = read_answers({"chosen": raw["chosen"]}, Fields(), location, ("chosen",))
        answers = parts.with_reasoning(answers, location)
        extra = other_fields(raw, "chosen", question, *parts.fields)
        asked = _question(raw[question], question, parts.input, location) if question else ()
        if any(turn["role"] == "user" for turn in before):
            _check_same_prompt(asked, before, location)
            context = before
        else:
            context = (*before, *asked)
        plain = not (before or parts.system or parts.history or parts.tools)
        if plain and question and isinstance(raw[question], str) and not _are_turns(raw[question]):
            return Row(location, str(raw[question]), parts.input, extra=extra, **answers.of())
        return conversation_row(location, parts.around(context, location), answers, parts.tools, extra)


@register
class DialoguePairFormat(RowFormat):
    """A preference pair of whole dialogues as texts of "Human:" and "Assistant:" turns, as in Anthropic's HH.
    The last turn of the chosen one is the response, what comes before it the prompt."""

    name = "chosen/rejected"
    precedence = 16
    reads = "`chosen`, `system`"
    example = (
        '{"chosen": "\\n\\nHuman: A fruit?\\n\\nAssistant: Fig", '
        '"rejected": "\\n\\nHuman: A fruit?\\n\\nAssistant: Carrot"}'
    )
    parsed = Row(
        "example",
        messages=({"role": "user", "content": "A fruit?"},),
        response="Fig",
        references=("Fig",),
        extra={"rejected": "\n\nHuman: A fruit?\n\nAssistant: Carrot"},
    )

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        texts = isinstance(raw.get("chosen"), str) and "rejected" in raw
        return is_detected(fields) and texts and _question_field(raw) is None

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        parts = PromptParts.read(raw, fields, location, None, input_fields=())
        turns = dialogue_turns(raw["chosen"])
        if turns is None:
            raise RowError(
                location,
                "has no prompt, and 'chosen' is no dialogue of Human: and Assistant:; name the field with "
                "the prompt: fields: {prompt: ..., response: chosen}",
                "no prompt",
            )
        check_completion(turns, "chosen", location)
        context, answers = split_conversation(turns)
        answers = parts.with_reasoning(answers, location)
        extra = other_fields(raw, "chosen", *parts.fields)
        return conversation_row(location, parts.around(context, location), answers, parts.tools, extra)


def dialogue_turns(text: str) -> tuple[Message, ...] | None:
    """The turns of a text of "Human:" and "Assistant:" paragraphs; None if it is none."""
    pieces = _SPEAKERS.split(text)
    if len(pieces) < 3 or pieces[0].strip() or pieces[1] != "Human":
        return None
    roles = ("user" if speaker == "Human" else "assistant" for speaker in pieces[1::2])
    return tuple(
        {"role": role, "content": content.strip()} for role, content in zip(roles, pieces[2::2], strict=True)
    )


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
