"""Texts in which a chat template has been rendered already."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from stillhouse.data.formats.base import RawRow, RowFormat, register
from stillhouse.data.formats.conversation import conversation_row, split_conversation
from stillhouse.data.formats.preference import dialogue_turns
from stillhouse.data.formats.turns import ROLES
from stillhouse.data.formats.values import other_fields
from stillhouse.data.rows import Fields, Message, Row

_ROLES = {"human": "user", "model": "assistant", "developer": "system", "ipython": "tool"}
_START = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|<\|endoftext\|>)?\s*")
_STOP = re.compile(r"\s*(?:</s>|<eos>|<\|endoftext\|>|<\|end_of_text\|>|<｜end▁of▁sentence｜>)?\s*\Z")
"""Beginning and end of a sequence, which the tokenizer adds again."""


@dataclass(frozen=True, slots=True)
class Markers:
    """How one family of templates marks turns.

    Example: `Markers("Gemma", "<start_of_turn>", pattern)`
    """

    name: str
    sign: str
    """What a text of this family begins with."""
    turn: re.Pattern[str]
    """Groups: `role`, `content`, and `end` where the template says that a turn is over."""


def _turn(opening: str, closing: str, next_opening: str) -> re.Pattern[str]:
    return re.compile(rf"\s*{opening}(?P<content>.*?)(?:(?P<end>{closing})|(?={next_opening})|\Z)", re.DOTALL)


FAMILIES = (
    Markers(
        "ChatML",
        "<|im_start|>",
        _turn(r"<\|im_start\|>(?P<role>\w+)\n", r"<\|im_end\|>", r"<\|im_start\|>"),
    ),
    Markers(
        "Llama 3",
        "<|start_header_id|>",
        _turn(
            r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n*",
            r"<\|eot_id\|>|<\|eom_id\|>",
            r"<\|start_header_id\|>",
        ),
    ),
    Markers(
        "Gemma",
        "<start_of_turn>",
        _turn(r"<start_of_turn>(?P<role>\w+)\n", r"<end_of_turn>", r"<start_of_turn>"),
    ),
    Markers(
        "Phi and Zephyr",
        "<|",
        _turn(
            r"<\|(?P<role>system|user|assistant|tool)\|>\n?",
            r"<\|end\|>|</s>|<\|endoftext\|>|<\|eos\|>",
            r"<\|(?:system|user|assistant|tool)\|>",
        ),
    ),
    Markers(
        "DeepSeek",
        "<｜User｜>",
        _turn(r"<｜(?P<role>User|Assistant)｜>", r"<｜end▁of▁sentence｜>", r"<｜(?:User|Assistant)｜>"),
    ),
    Markers(
        "Guanaco",
        "### ",
        _turn(r"### (?P<role>Human|Assistant|System): ?", r"(?!)", r"### (?:Human|Assistant):"),
    ),
)

_INST = re.compile(
    r"\s*(?:<s>)?\s*\[INST\](?P<user>.*?)\[/INST\](?P<assistant>.*?)(?:(?P<end></s>)|(?=\[INST\])|\Z)",
    re.DOTALL,
)
_SYS = re.compile(r"\A\s*<<SYS>>(?P<system>.*?)<</SYS>>(?P<user>.*)\Z", re.DOTALL)
_ALPACA = re.compile(
    r"\A(?P<system>.*?)### Instruction:\n(?P<instruction>.*?)(?:\n+### Input:\n(?P<input>.*?))?"
    r"\n+### Response:(?P<response>.*)\Z",
    re.DOTALL,
)
INST = "Llama 2 and Mistral"
_ALPACA_WORDS = "Below is an instruction that describes a task"


@register
class TemplatedTextFormat(RowFormat):
    """Text in which a chat template is rendered already: ChatML, Llama 2 and 3, Mistral, Gemma, Phi, Zephyr,
    DeepSeek, Alpaca, Guanaco ("### Human:") or "Human:". Its turns are read, and rendered again by
    `data.template`; as `data.text` it is plain text."""

    name = "templated text"
    precedence = 90
    reads = "`text`"
    field: ClassVar[str] = "text"
    example = '{"text": "<|im_start|>user\\nA fruit?<|im_end|>\\n<|im_start|>assistant\\nFig<|im_end|>"}'
    parsed = Row(
        "example",
        messages=({"role": "user", "content": "A fruit?"},),
        response="Fig",
        references=("Fig",),
        text="<|im_start|>user\nA fruit?<|im_end|>\n<|im_start|>assistant\nFig<|im_end|>",
    )

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        value = raw.get(fields.text or self.field)
        named = fields.prompt is not None or fields.messages is not None
        return not named and isinstance(value, str) and family_of(value) is not None

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        name = fields.text or self.field
        text = raw[name]
        extra = other_fields(raw, name)
        found = read_templated(text)
        if isinstance(found, str):
            return Row(location, text=text, extra=extra)
        if isinstance(found, Row):
            return replace(found, location=location, text=text, extra=extra)
        turns, finished = found
        context, answers = split_conversation(turns)
        if not context:
            return Row(location, text=text, extra=extra)
        row = conversation_row(location, context, answers, (), extra)
        return replace(row, text=text, finished=finished or not answers.turns)


def family_of(text: str) -> str | None:
    """The name of the templates that a text is rendered with; None for text that begins otherwise."""
    start = _START.match(text)
    begin = text[start.end() if start else 0 :]
    for markers in FAMILIES:
        if begin.startswith(markers.sign) and markers.turn.match(begin):
            return markers.name
    if begin.startswith("[INST]") and "[/INST]" in text:
        return INST
    if begin.startswith((_ALPACA_WORDS, "### Instruction:\n")) and _ALPACA.match(text):
        return "Alpaca"
    return "Human and Assistant" if dialogue_turns(text) else None


def read_templated(text: str) -> tuple[tuple[Message, ...], bool] | Row | str:
    """What a rendered text holds.

    Returns:
        Its turns, and whether the last one ends where the template says so; of Alpaca's template a row; of
        text that is not wholly turns the beginning of what is not.
    """
    family = family_of(text)
    if family == "Alpaca":
        return _alpaca_row(text)
    if family == INST:
        return _turns(_INST, text, _inst_turns)
    dialogue = dialogue_turns(text)
    if dialogue is not None:
        return dialogue, True
    markers = next((one for one in FAMILIES if one.name == family), None)
    return text[:60] if markers is None else _turns(markers.turn, text, _marked_turn)


def _turns(
    pattern: re.Pattern[str], text: str, read: Callable[[re.Match[str], bool], Iterator[Message]]
) -> tuple[tuple[Message, ...], bool] | str:
    start = _START.match(text)
    place = start.end() if start else 0
    turns: list[Message] = []
    ends: list[bool] = []
    while not _STOP.match(text, place):
        found = pattern.match(text, place)
        if found is None or found.end() == place:
            return text[place : place + 60]
        turns.extend(read(found, not turns))
        if turns[-1]["role"] not in ROLES:
            return text[place : place + 60]
        ends.append(found["end"] is not None)
        place = found.end()
    finished = not ends or ends[-1] or not any(ends)
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()  # the generation prompt
    return tuple(turns), finished


def _marked_turn(found: re.Match[str], first: bool) -> Iterator[Message]:
    role = found["role"].lower()
    yield {"role": _ROLES.get(role, role), "content": found["content"].strip()}


def _inst_turns(found: re.Match[str], first: bool) -> Iterator[Message]:
    user = found["user"]
    system = _SYS.match(user) if first else None
    if system is not None:
        yield {"role": "system", "content": system["system"].strip()}
        user = system["user"]
    yield {"role": "user", "content": user.strip()}
    yield {"role": "assistant", "content": found["assistant"].strip()}


def _alpaca_row(text: str) -> Row:
    found = _ALPACA.match(text)
    assert found is not None
    response = _STOP.sub("", found["response"]).strip()
    return Row(
        "",
        found["instruction"].strip(),
        (found["input"] or "").strip(),
        response=response or None,
        references=(response,) if response else (),
    )
