"""Answers that can be checked, and are wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stillhouse.grading import CodeProblem, MathsProblem, grade, problem_of, require_sandbox, run_program
from stillhouse.rollouts.offline.filters.base import REGISTRY, Around, Drop, Filter
from stillhouse.sandbox import Limits

if TYPE_CHECKING:
    from stillhouse.rollouts.offline.samples import Sample


@REGISTRY.register
class Verified(Filter):
    """Drops responses that answer wrongly, where the row says what is right.

    Mathematics: the final answer (after `####`, boxed, or the last number) has to equal that of the row's
    `answer`, by value or by math-verify. Programs: they have to pass the row's tests (fields of HumanEval or
    MBPP), in the sandbox.

    Example: `{kind: verified, unknown: keep}`
    """

    kind: Literal["verified"] = "verified"
    unknown: Literal["keep", "drop"] = "drop"
    """What happens where the row has nothing to check an answer by."""
    seconds: Annotated[float, Field(gt=0.0)] = 10.0
    """Time that a program and its tests may take."""

    def judge(self, samples: Sequence[Sample], around: Around) -> list[Drop | None]:
        """By comparing final answers, and by running tests.

        Raises:
            EnvironmentFault: a program would have to be run, and cannot be confined on this machine.
        """
        problems = [problem_of(facts_of(sample)) for sample in samples]
        programs = [place for place, problem in enumerate(problems) if isinstance(problem, CodeProblem)]
        if programs:
            require_sandbox()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            ran = pool.map(lambda place: self._ran(problems[place], samples[place].text), programs)
            verdicts = dict(zip(programs, ran, strict=True))
        return [
            verdicts[place] if place in verdicts else self._graded(problem, samples[place].text)
            for place, problem in enumerate(problems)
        ]

    def _ran(self, problem: CodeProblem | MathsProblem | None, text: str) -> Drop | None:
        assert isinstance(problem, CodeProblem)
        limits = Limits(self.seconds, max(1, round(self.seconds)))
        result = run_program(problem.program(text), problem.tests, limits)
        return None if result.passed else Drop("fails its tests", f"{result.status} {result.detail}".strip())

    def _graded(self, problem: CodeProblem | MathsProblem | None, text: str) -> Drop | None:
        if not isinstance(problem, MathsProblem):
            return Drop("nothing to check it by") if self.unknown == "drop" else None
        graded = grade(text, problem.answer)
        if graded.flexible:
            return None
        return Drop("wrong answer", f"{graded.answer or 'none'}, right is {problem.answer}")


def facts_of(sample: Sample) -> Mapping[str, Any]:
    """The fields of the sample's row, with the names that problems of mathematics and code have."""
    prompt = sample.response.prompt
    right = {name: prompt.references[0] for name in ("answer", "code") if prompt.references}
    return {"prompt": prompt.question, **right, **prompt.facts}
