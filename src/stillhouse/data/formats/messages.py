"""OpenAI's chat format."""

from __future__ import annotations

from stillhouse.data.formats.base import (
    RawRow,
    RowFormat,
    other_fields,
    read_messages,
    read_responses,
    register,
)
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import DataError


@register
class MessagesFormat(RowFormat):
    """A conversation, as in OpenAI's chat format. A last turn of the assistant is the response."""

    name = "messages"
    precedence = 10
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
        if fields.messages is not None:
            return True
        return fields.prompt is None and fields.text is None and isinstance(raw.get("messages"), list)

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        name = fields.messages or "messages"
        if not isinstance(raw[name], list):
            raise DataError(
                f"{location}: field {name!r} (fields.messages) should be a list of {{role, content}}, "
                f"got {type(raw[name]).__name__} {raw[name]!r:.80}"
            )
        messages = read_messages(raw[name], name, location)
        responses = read_responses(raw, fields, location) if fields.response else ()
        if messages and messages[-1]["role"] == "assistant":
            *context, last = messages
            responses = responses or ((last["content"],) if last["content"] else ())
            messages = tuple(context)
        if not messages:
            raise DataError(f"{location}: the conversation in {name!r} has no turn before the response")
        return Row(
            location,
            messages=messages,
            response=responses[0] if responses else None,
            references=responses,
            extra=other_fields(raw, name, fields.response),
        )
