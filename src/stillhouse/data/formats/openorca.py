"""OpenOrca's format."""

from __future__ import annotations

from stillhouse.data.formats.base import register
from stillhouse.data.formats.prompt_fields import PromptFieldFormat
from stillhouse.data.formats.values import RawRow
from stillhouse.data.rows import Fields, Row


@register
class OpenOrcaFormat(PromptFieldFormat):
    """A question with its system prompt, as in OpenOrca."""

    name = "system_prompt/question/response"
    precedence = 30
    reads = "`system_prompt`, `question`, the response, `context`, `history`, `tools`"
    prompt_field = "question"
    example = '{"system_prompt": "Be brief.", "question": "A fruit?", "response": "Fig"}'
    parsed = Row(
        "example",
        messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "A fruit?"}),
        response="Fig",
        references=("Fig",),
    )

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return "system_prompt" in raw and super().matches(raw, fields)
