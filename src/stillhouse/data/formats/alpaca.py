"""Stanford Alpaca's format."""

from __future__ import annotations

from stillhouse.data.formats.base import PromptFieldFormat, register
from stillhouse.data.rows import Row


@register
class AlpacaFormat(PromptFieldFormat):
    """An instruction, what it is about, and the response, as in Stanford Alpaca; `outputs` is a list of
    references."""

    name = "instruction/input/output"
    precedence = 20
    prompt_field = "instruction"
    example = '{"instruction": "Translate to German.", "input": "Good night.", "output": "Gute Nacht."}'
    parsed = Row(
        "example",
        instruction="Translate to German.",
        input="Good night.",
        response="Gute Nacht.",
        references=("Gute Nacht.",),
    )
