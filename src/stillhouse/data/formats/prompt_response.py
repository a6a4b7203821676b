"""A prompt and its response or completion."""

from __future__ import annotations

from stillhouse.data.formats.base import register
from stillhouse.data.formats.prompt_fields import PromptFieldFormat
from stillhouse.data.formats.values import RawRow
from stillhouse.data.rows import Fields, Row


@register
class PromptResponseFormat(PromptFieldFormat):
    """A prompt and a `response` or `completion`; each may be a list of turns of any length. Rows whose prompt
    field is named by `fields.prompt` have this format."""

    name = "prompt/response"
    precedence = 32
    reads = "`prompt`, `input` or `context`, the response, `system`, `history`, `tools`"
    prompt_field = "prompt"
    example = '{"prompt": "Name a fruit.", "response": "Fig"}'
    parsed = Row("example", instruction="Name a fruit.", response="Fig", references=("Fig",))

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        named = fields.prompt is not None and fields.text is None and fields.messages is None
        return named or super().matches(raw, fields)
