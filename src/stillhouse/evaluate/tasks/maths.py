"""Mathematics, scored by the final answer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.config import ListOf
from stillhouse.data import DatasetConfig
from stillhouse.data.rows import Row
from stillhouse.errors import DataError
from stillhouse.evaluate.tasks.base import REGISTRY
from stillhouse.evaluate.tasks.prompts import EvalExample, FewShotTask, Scores
from stillhouse.grading import MathsProblem, grade, problem_of
from stillhouse.grading.maths import TOLERANCE


class MathsTask(FewShotTask):
    """Rows of `question` and `answer`.

    `accuracy` (0 to 1) counts responses whose answer is marked as final and correct; `accuracy_flexible` also
    accepts the last number, or any expression, of a response that marks none.
    """

    tolerance: Annotated[float, Field(ge=0)] = TOLERANCE
    """How far apart two equal numbers may be, as `grading.maths.equal_numbers` says; the default is that of
    six decimals. 0.001 accepts 0.333 for 1/3."""
    prompt_format: str = "{question}"
    """The instruction, with `{question}` for that of the row."""
    stop: ListOf[str] = ("\nQuestion:", "\nQ:")
    """A response is cut at the first of these, where a model continues with another problem."""

    def parse_row(self, raw: Mapping[str, Any], where: str, dataset: DatasetConfig) -> Row:
        """The question after the few-shot examples; the reference is the final answer."""
        problem = problem_of(raw)
        if "question" not in raw or not isinstance(problem, MathsProblem):
            raise DataError(f"{where}: {self.kind} needs rows of question and answer; got {', '.join(raw)}")
        return Row(where, self._examples + self._instruction(raw), references=(problem.answer,))

    @cached_property
    def _examples(self) -> str:
        rows = self.few_shot_rows()
        return "".join(f"{self._instruction(raw)}\n{str(raw['answer']).strip()}\n\n" for raw in rows)

    def _instruction(self, raw: Mapping[str, Any]) -> str:
        return self.prompt_format.replace("{question}", str(raw["question"]).strip())

    def score(self, example: EvalExample, response: str) -> Scores:
        """Both accuracies, and the extracted answer."""
        for stop in self.stop:
            response = response.split(stop, 1)[0]
        result = grade(response, example.prompt.references[0], self.tolerance)
        return {
            "answer": result.answer,
            "accuracy": float(result.strict),
            "accuracy_flexible": float(result.flexible),
        }

    def score_settings(self) -> dict[str, Any]:
        """How answers were extracted and compared."""
        return {
            "accuracy": "final answer after #### or boxed; numbers by tolerance, expressions by math-verify",
            "tolerance": self.tolerance,
            "few_shot": self.few_shot,
        }


@REGISTRY.register
class GSM8K(MathsTask):
    """Grade-school word problems, answers after `####` (Cobbe et al. 2021, arXiv 2110.14168).

    Example: `evaluate: {tasks: [{kind: gsm8k, data: gsm8k_test.jsonl, limit: 200}]}`
    """

    kind: Literal["gsm8k"] = "gsm8k"


@REGISTRY.register
class SVAMP(MathsTask):
    """One-step word problems, varied so that key words mislead (Patel et al. 2021, arXiv 2103.07191)."""

    kind: Literal["svamp"] = "svamp"


@REGISTRY.register
class Math500(MathsTask):
    """Competition problems whose answers are expressions (Hendrycks et al. 2021, arXiv 2103.03874; the 500 of
    Lightman et al. 2023, arXiv 2305.20050)."""

    kind: Literal["math500"] = "math500"
    prompt_format: str = "{question}\nPut the final answer in \\boxed{}."
