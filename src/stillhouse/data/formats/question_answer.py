"""A question and its answer."""

from __future__ import annotations

from stillhouse.data.formats.base import register
from stillhouse.data.formats.prompt_fields import PromptFieldFormat
from stillhouse.data.rows import Row


@register
class QuestionAnswerFormat(PromptFieldFormat):
    """A question and its answer, a text or a number, as in GSM8K; `context` is what it is about."""

    name = "question/answer"
    precedence = 40
    reads = "`question`, `context` or `input`, the response, `system`, `history`, `tools`"
    prompt_field = "question"
    example = '{"question": "What is 2 + 2?", "answer": 4}'
    parsed = Row("example", instruction="What is 2 + 2?", response="4", references=("4",))
