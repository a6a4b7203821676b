"""The format of Qwen's and ModelScope's tools."""

from __future__ import annotations

from stillhouse.data.formats.base import register
from stillhouse.data.formats.prompt_fields import PromptFieldFormat
from stillhouse.data.rows import Row


@register
class QueryResponseFormat(PromptFieldFormat):
    """A query and its response, with earlier turns as pairs in `history`, as in ms-swift and Qwen's code."""

    name = "query/response/history"
    precedence = 35
    reads = "`query`, `input` or `context`, the response, `system`, `history`, `tools`"
    prompt_field = "query"
    example = '{"query": "And a nut?", "response": "Almond", "history": [["A fruit?", "Fig"]]}'
    parsed = Row(
        "example",
        messages=(
            {"role": "user", "content": "A fruit?"},
            {"role": "assistant", "content": "Fig"},
            {"role": "user", "content": "And a nut?"},
        ),
        response="Almond",
        references=("Almond",),
    )
