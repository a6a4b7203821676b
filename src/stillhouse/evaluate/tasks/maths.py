"""Problems of mathematics, scored by their final answer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.config import ListOf
from stillhouse.data import DatasetConfig
from stillhouse.data.rows import Row
from stillhouse.errors import DataError
from stillhouse.evaluate.tasks.base import REGISTRY, Question, Scores
from stillhouse.evaluate.tasks.shots import WithShots
from stillhouse.grading import MathsProblem, grade, problem_of


class _Maths(WithShots):
    """Rows of `question` and `answer`.

    `accuracy` (0 to 1) counts answers that are marked as final and right; `accuracy_flexible` also takes the
    last number, or any expression, of a text that marks none.
    """

    tolerance: Annotated[float, Field(ge=0)] = 1e-3
    """How far apart two numbers may be and still be equal."""
    ask: str = "{question}"
    """The instruction; `{question}` stands for the row's."""
    stop: ListOf[str] = ("\nQuestion:", "\nQ:")
    """An answer counts up to the first of these, where a model goes on with another problem."""

    def row(self, raw: Mapping[str, Any], where: str, source: DatasetConfig) -> Row:
        """The question, after the worked examples; the reference is the final answer."""
        problem = problem_of(raw)
        if "question" not in raw or not isinstance(problem, MathsProblem):
            raise DataError(f"{where}: {self.kind} needs rows of question and answer; got {', '.join(raw)}")
        asked = self._examples + self._asking(raw)
        return Row(where, asked, references=(problem.answer,))

    @cached_property
    def _examples(self) -> str:
        return "".join(f"{self._asking(raw)}\n{str(raw['answer']).strip()}\n\n" for raw in self.worked())

    def _asking(self, raw: Mapping[str, Any]) -> str:
        return self.ask.replace("{question}", str(raw["question"]).strip())

    def score(self, question: Question, text: str) -> Scores:
        """Both accuracies, and what was taken as the answer."""
        for end in self.stop:
            text = text.split(end, 1)[0]
        graded = grade(text, question.prompt.references[0], self.tolerance)
        return {
            "answer": graded.answer,
            "accuracy": float(graded.strict),
            "accuracy_flexible": float(graded.flexible),
        }

    def about(self) -> dict[str, Any]:
        """How answers were found and compared."""
        return {
            "accuracy": "final answer after #### or boxed; numbers by tolerance, expressions by math-verify",
            "tolerance": self.tolerance,
            "shots": self.shots,
        }


@REGISTRY.register
class GSM8K(_Maths):
    """Word problems of grade school, answers after `####` (Cobbe et al. 2021, arXiv 2110.14168).

    Example: `evaluate: {tasks: [{kind: gsm8k, data: gsm8k_test.jsonl, limit: 200}]}`
    """

    kind: Literal["gsm8k"] = "gsm8k"


@REGISTRY.register
class SVAMP(_Maths):
    """Word problems of one step, varied so that key words mislead (Patel et al. 2021, arXiv 2103.07191)."""

    kind: Literal["svamp"] = "svamp"


@REGISTRY.register
class Math500(_Maths):
    """Competition problems whose answers are expressions (Hendrycks et al. 2021, arXiv 2103.03874; the 500 of
    Lightman et al. 2023, arXiv 2305.20050)."""

    kind: Literal["math500"] = "math500"
    ask: str = "{question}\nPut the final answer in \\boxed{}."
