"""OpenAI's chat format."""

from __future__ import annotations

from stillhouse.data.formats.base import INPUT_FIELDS, RawRow, RowFormat, register
from stillhouse.data.formats.conversation import conversation_row, split_conversation
from stillhouse.data.formats.prompt_fields import PromptParts, is_detected, read_answers
from stillhouse.data.formats.turns import holds_turns, read_messages
from stillhouse.data.formats.values import other_fields
from stillhouse.data.rows import Fields, Row


class TurnsFormat(RowFormat):
    """A conversation in one field, with tools and a system message in others. A last turn of the assistant
    is the response."""

    turns_fields: tuple[str, ...]

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return is_detected(fields) and any(
            name in raw and holds_turns(raw[name]) for name in self.turns_fields
        )

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        name = fields.messages or next(name for name in self.turns_fields if holds_turns(raw.get(name)))
        parts = PromptParts.read(raw, fields, location, name, input_fields=())
        turns, answers = split_conversation(read_messages(raw[name], name, location))
        if fields.response:
            answers = read_answers(raw, fields, location, ())
        answers = parts.with_reasoning(answers, location)
        context = parts.around(turns, location)
        extra = other_fields(raw, name, *parts.fields, *answers.fields)
        blank = [name for name in INPUT_FIELDS if extra.get(name) == ""]
        return conversation_row(location, context, answers, parts.tools, other_fields(extra, *blank))


@register
class MessagesFormat(TurnsFormat):
    """A conversation, as in OpenAI's chat format. A last turn of the assistant is the response. Content may
    be null beside tool calls, or a list of text parts; `weight: 0` keeps a turn from being trained on; the
    developer's turn is the system's. The list may be JSON text."""

    name = "messages"
    precedence = 10
    turns_fields = ("messages", "conversation", "dialog", "dialogue")
    reads = (
        "`messages` (of each turn `role`, `content`, `tool_calls`, `tool_call_id`, `name`, `weight`, and "
        "`reasoning_content`, `reasoning` or `thinking`), `tools`, `system`"
    )
    example = (
        '{"messages": [{"role": "user", "content": "A fruit?"}, {"role": "assistant", "content": "Fig"}]}'
    )
    parsed = Row(
        "example",
        messages=({"role": "user", "content": "A fruit?"},),
        response="Fig",
        references=("Fig",),
    )

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return fields.messages is not None or super().matches(raw, fields)
