"""Stanford Alpaca's format, with the fields that LLaMA-Factory adds."""

from __future__ import annotations

from stillhouse.data.formats.base import register
from stillhouse.data.formats.prompt_fields import PromptFieldFormat
from stillhouse.data.rows import Row


@register
class AlpacaFormat(PromptFieldFormat):
    """An instruction, what it is about, and the response, as in Stanford Alpaca; `outputs` is a list of
    references. A system message and history, as in LLaMA-Factory, make it a conversation."""

    name = "instruction/input/output"
    precedence = 22
    reads = "`instruction`, `input`, the response, `system`, `history`, `tools`"
    prompt_field = "instruction"
    example = '{"instruction": "Translate to German.", "input": "Good night.", "output": "Gute Nacht."}'
    parsed = Row(
        "example",
        instruction="Translate to German.",
        input="Good night.",
        response="Gute Nacht.",
        references=("Gute Nacht.",),
    )
