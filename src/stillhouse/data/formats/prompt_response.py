"""A prompt and its response."""

from __future__ import annotations

from stillhouse.data.formats.base import PromptFieldFormat, RawRow, register
from stillhouse.data.rows import Fields, Row


@register
class PromptResponseFormat(PromptFieldFormat):
    """A prompt and a `response` or `completion`; each may be a list of messages. Rows whose prompt field is
    named by `fields.prompt` have this format."""

    name = "prompt/response"
    precedence = 30
    prompt_field = "prompt"
    example = '{"prompt": "Name a fruit.", "response": "Fig"}'
    parsed = Row("example", instruction="Name a fruit.", response="Fig", references=("Fig",))

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return super().matches(raw, fields) or (fields.prompt is not None and fields.text is None)
