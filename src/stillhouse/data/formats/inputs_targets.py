"""The formats of FLAN, P3 and Aya, and of tables with an input and an output."""

from __future__ import annotations

from stillhouse.data.formats.base import register
from stillhouse.data.formats.prompt_fields import PromptFieldFormat
from stillhouse.data.formats.values import RawRow
from stillhouse.data.rows import Fields, Row


@register
class InputsTargetsFormat(PromptFieldFormat):
    """A whole prompt in `inputs` and the response in `targets`, as in FLAN, P3 and Aya."""

    name = "inputs/targets"
    precedence = 50
    reads = "`inputs`, `targets`, `context`, `system`, `history`, `tools`"
    prompt_field = "inputs"
    response_fields = ("targets", "target", "outputs", "output", "response")
    example = '{"inputs": "A fruit?", "targets": "Fig"}'
    parsed = Row("example", instruction="A fruit?", response="Fig", references=("Fig",))


@register
class InputOutputFormat(PromptFieldFormat):
    """A prompt in `input` and the response in `output`, where there is no instruction."""

    name = "input/output"
    precedence = 52
    reads = "`input`, `output`, `context`, `system`, `history`, `tools`"
    prompt_field = "input"
    input_fields = ("context",)
    response_fields = ("outputs", "output")
    example = '{"input": "A fruit?", "output": "Fig"}'
    parsed = Row("example", instruction="A fruit?", response="Fig", references=("Fig",))

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return ("output" in raw or "outputs" in raw) and super().matches(raw, fields)
