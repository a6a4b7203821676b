"""Mathematics with worked solutions."""

from __future__ import annotations

from stillhouse.data.formats.base import register
from stillhouse.data.formats.prompt_fields import PromptFieldFormat
from stillhouse.data.rows import Row


@register
class ProblemSolutionFormat(PromptFieldFormat):
    """A problem with a worked solution, which is the response, and the final answer, which grading compares
    with; without a solution the answer is the response. Numbers are read as text."""

    name = "problem/solution/answer"
    precedence = 37
    reads = "`problem`, `solution` (or `generated_solution`), `answer`, `input` or `context`, `system`"
    prompt_field = "problem"
    response_fields = (
        "solution",
        "generated_solution",
        "outputs",
        "output",
        "response",
        "completion",
        "answer",
    )
    example = '{"problem": "2 + 2?", "solution": "So \\\\boxed{4}", "answer": 4}'
    parsed = Row(
        "example",
        instruction="2 + 2?",
        response="So \\boxed{4}",
        references=("So \\boxed{4}",),
        extra={"answer": 4},
    )
