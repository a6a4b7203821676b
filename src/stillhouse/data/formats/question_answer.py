"""A question and its answer."""

from __future__ import annotations

from stillhouse.data.formats.base import PromptFieldFormat, register
from stillhouse.data.rows import Row


@register
class QuestionAnswerFormat(PromptFieldFormat):
    """A question and its answer."""

    name = "question/answer"
    precedence = 40
    prompt_field = "question"
    example = '{"question": "What is 2 + 2?", "answer": "4"}'
    parsed = Row("example", instruction="What is 2 + 2?", response="4", references=("4",))
