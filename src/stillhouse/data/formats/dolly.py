"""Databricks' Dolly."""

from __future__ import annotations

from stillhouse.data.formats.base import register
from stillhouse.data.formats.prompt_fields import PromptFieldFormat
from stillhouse.data.formats.values import RawRow
from stillhouse.data.rows import Fields, Row


@register
class DollyFormat(PromptFieldFormat):
    """An instruction with the passage that it is about in `context`, as databricks-dolly-15k has it."""

    name = "instruction/context/response"
    precedence = 20
    reads = "`instruction`, `context`, the response, `system`, `history`, `tools`"
    prompt_field = "instruction"
    example = (
        '{"instruction": "When was it built?", "context": "The mill was built in 1820.", "response": "1820"}'
    )
    parsed = Row(
        "example",
        instruction="When was it built?",
        input="The mill was built in 1820.",
        response="1820",
        references=("1820",),
    )

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return "context" in raw and super().matches(raw, fields)
