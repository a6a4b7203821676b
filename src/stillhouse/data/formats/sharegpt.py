"""ShareGPT's conversations."""

from __future__ import annotations

from stillhouse.data.formats.base import register
from stillhouse.data.formats.messages import TurnsFormat
from stillhouse.data.rows import Row


@register
class ShareGPTFormat(TurnsFormat):
    """A conversation of ShareGPT: human, gpt and system; a `function_call` is the assistant's call as JSON,
    an `observation` (or `tool`) its result. A last turn of the assistant is the response."""

    name = "conversations"
    precedence = 12
    turns_fields = ("conversations",)
    reads = "`conversations` (of each turn `from`, `value`, `weight`), `tools`, `system`"
    example = (
        '{"conversations": [{"from": "system", "value": "Be brief."}, '
        '{"from": "human", "value": "A fruit?"}, {"from": "gpt", "value": "Fig"}]}'
    )
    parsed = Row(
        "example",
        messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "A fruit?"}),
        response="Fig",
        references=("Fig",),
    )
