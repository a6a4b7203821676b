"""Rows with the prompt in one field and its parts beside it: what the formats without turns share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from stillhouse.data.formats.base import (
    HISTORY_FIELDS,
    INPUT_FIELDS,
    SYSTEM_FIELDS,
    TOOLS_FIELDS,
    RowFormat,
)
from stillhouse.data.formats.conversation import (
    Answers,
    check_completion,
    conversation_row,
    with_system,
)
from stillhouse.data.formats.turns import is_turn, read_history, read_messages, read_tools
from stillhouse.data.formats.values import RawRow, as_list, first_filled, is_blank, other_fields, read_string
from stillhouse.data.rows import Fields, Message, Row
from stillhouse.errors import RowError

RESPONSE_FIELDS = ("outputs", "output", "response", "completion", "answer", "answers")
"""Where a response is looked for, in this order."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


class PromptFieldFormat(RowFormat):
    """A prompt in one field, and beside it an input, a system message, history, tools, reasoning and the
    response, each in one of several fields."""

    prompt_field: ClassVar[str]
    input_fields: ClassVar[tuple[str, ...]] = INPUT_FIELDS
    response_fields: ClassVar[tuple[str, ...]] = RESPONSE_FIELDS

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return is_detected(fields) and raw.get(self.prompt_field) is not None

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        prompt = fields.prompt or self.prompt_field
        parts = PromptParts.read(raw, fields, location, prompt, self.input_fields)
        answers = read_answers(raw, fields, location, self.response_fields)
        answers = parts.with_reasoning(answers, location)
        extra = other_fields(raw, prompt, *parts.fields, *answers.fields)
        turns = as_list(raw[prompt])
        if isinstance(turns, list) and (turns is raw[prompt] or all(map(is_turn, _listed(turns)))):
            messages = read_messages(turns, prompt, location)
            if parts.input:
                raise RowError(
                    location,
                    f"has an input beside the turns in {prompt!r}; put it into a turn",
                    "input beside a conversation",
                )
            return conversation_row(location, parts.around(messages, location), answers, parts.tools, extra)
        instruction = read_string(raw[prompt], prompt, location)
        if parts.system is None and not parts.history and not parts.tools:
            return Row(location, instruction, parts.input, extra=extra, **answers.of())
        content = "\n\n".join(filter(None, (instruction, parts.input)))
        messages = ({"role": "user", "content": content},)
        return conversation_row(location, parts.around(messages, location), answers, parts.tools, extra)


class PromptParts:
    """What a row has beside its prompt."""

    def __init__(self) -> None:
        self.input = ""
        self.system: str | None = None
        self.history: tuple[Message, ...] = ()
        self.tools: tuple[Mapping[str, Any], ...] = ()
        self.reasoning: str | None = None
        self.names: dict[str, str] = {}
        """The field that each part was read from."""
        self.known: set[str] = set()
        """Blank fields of a part, which say that there is none."""

    @property
    def fields(self) -> set[str]:
        """The fields that were read."""
        return {*self.names.values(), *self.known}

    @classmethod
    def read(
        cls,
        raw: RawRow,
        fields: Fields,
        location: str,
        prompt: str | None,
        input_fields: tuple[str, ...] = INPUT_FIELDS,
    ) -> PromptParts:
        """Read the parts; `fields` says where, else they are looked for in the usual fields.

        Raises:
            RowError: a part has another type, or is in two fields.
        """
        parts = cls()
        places = {
            "input": input_fields,
            "system": SYSTEM_FIELDS,
            "history": HISTORY_FIELDS,
            "tools": TOOLS_FIELDS,
            "reasoning": REASONING_FIELDS,
        }
        named = fields.named
        taken = {prompt, *named.values()}
        for role, usual in places.items():
            names = (named[role],) if role in named else tuple(name for name in usual if name not in taken)
            names = tuple(name for name in names if name in raw)
            filled = [name for name in names if not is_blank(raw[name])]
            parts.known.update(names)
            if filled:
                _check_single(raw, role, filled, location)
                parts.names[role] = filled[0]
        for role in ("input", "system", "reasoning"):
            if role in parts.names:
                setattr(parts, role, read_string(raw[parts.names[role]], parts.names[role], location))
        if "history" in parts.names:
            parts.history = read_history(raw[parts.names["history"]], parts.names["history"], location)
        if "tools" in parts.names:
            parts.tools = read_tools(raw[parts.names["tools"]], parts.names["tools"], location)
        return parts

    def with_reasoning(self, answers: Answers, location: str) -> Answers:
        """The response with the row's reasoning before it; reasoning without a response stays unread.

        Raises:
            RowError: there are several references, or several turns.
        """
        if self.reasoning is None:
            return answers
        turns = answers.turns or tuple({"role": "assistant", "content": text} for text in answers.texts)
        if not turns:
            self.known.discard(self.names.pop("reasoning"))
            return answers
        if len(turns) > 1:
            name = self.names["reasoning"]
            raise RowError(
                location,
                f"field {name!r} belongs to one response, and there are {len(turns)}; "
                f"leave it out with data.ignore: [{name}]",
                "reasoning of several responses",
            )
        return Answers(turns=({"reasoning_content": self.reasoning, **turns[0]},), fields=answers.fields)

    def around(self, messages: tuple[Message, ...], location: str) -> tuple[Message, ...]:
        """System message, history, then these turns."""
        leading = messages[:1] if messages and messages[0]["role"] == "system" and self.history else ()
        turns = (*leading, *self.history, *messages[len(leading) :])
        if self.system is None:
            return turns
        return with_system(turns, self.system, self.names["system"], location)


def _check_single(raw: RawRow, role: str, filled: list[str], location: str) -> None:
    different = [name for name in filled[1:] if raw[name] != raw[filled[0]]]
    if different:
        raise RowError(
            location,
            f"fields {filled[0]!r} and {different[0]!r} both hold the {role}; choose one: "
            f"fields: {{{role}: {filled[0]}}} with data.ignore: [{different[0]}]",
            "two fields for one part of the prompt",
        )


def is_detected(fields: Fields) -> bool:
    """Whether the format of a row is detected, and not said by `fields`."""
    return fields.prompt is None and fields.messages is None and fields.text is None


def read_answers(raw: RawRow, fields: Fields, location: str, usual: tuple[str, ...]) -> Answers:
    """All responses of a row, without blank ones: texts, or the turns of one.

    Raises:
        RowError: a value is neither text nor turns.
    """
    taken = set(fields.named.values())
    names = (fields.response,) if fields.response else tuple(name for name in usual if name not in taken)
    name = first_filled(raw, names)
    blank = tuple(one for one in names if one in raw and is_blank(raw[one]))
    if name is None:
        return Answers(fields=blank)
    value = raw[name]
    if is_turn(value):
        value = [value]
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = list(dict.fromkeys(value["text"]))  # SQuAD's answers with their places
    if fields.response and isinstance(value, str):
        value = as_list(value) if all(map(is_turn, _listed(as_list(value)))) else value
    used = (name, *blank)
    if isinstance(value, list) and value and all(map(is_turn, value)):
        turns = read_messages(value, name, location)
        check_completion(turns, name, location)
        return Answers(turns=turns, fields=used)
    texts = (read_string(item, name, location) for item in (value if isinstance(value, list) else [value]))
    return Answers(texts=tuple(text for text in texts if text.strip()), fields=used)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value else [None]
