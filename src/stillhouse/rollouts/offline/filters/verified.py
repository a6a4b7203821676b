"""Wrong answers to problems whose answers can be checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import Field

from stillhouse.grading import CodeProblem, MathsProblem, grade, problem_of, require_sandbox, run_program
from stillhouse.rollouts.offline.filters.base import REGISTRY, Drop, Filter, FilterContext
from stillhouse.rollouts.offline.samples import Sample
from stillhouse.sandbox import Limits


@REGISTRY.register
class Verified(Filter):
    """Drops wrong answers, where the row has what is needed to check them.

    Mathematics: the final answer (after `####`, boxed, or the last number) has to equal that of the row's
    `answer`, by value or by math-verify. Programs: they have to pass the row's tests (fields of HumanEval or
    MBPP), in the sandbox.

    Example: `{kind: verified, unverifiable: keep}`
    """

    kind: Literal["verified"] = "verified"
    unverifiable: Literal["keep", "drop"] = "drop"
    """What happens to responses whose row has nothing to check them with."""
    timeout: Annotated[float, Field(gt=0.0)] = 10.0
    """Seconds that a program and its tests may take."""

    def compares_responses(self) -> bool:
        """It does not."""
        return False

    def apply(self, samples: Sequence[Sample], context: FilterContext) -> list[Drop | None]:
        """Compares final answers and runs tests.

        Raises:
            EnvironmentFault: a program would have to be run, and cannot be confined on this machine.
        """
        problems = [problem_of(_problem_row(sample)) for sample in samples]
        programs = {
            place: problem for place, problem in enumerate(problems) if isinstance(problem, CodeProblem)
        }
        if programs:
            require_sandbox()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            results = pool.map(
                lambda place: self._run_tests(programs[place], samples[place].text), list(programs)
            )
            tested = dict(zip(programs, results, strict=True))
        return [
            tested[place] if place in tested else self._compare(problem, samples[place].text)
            for place, problem in enumerate(problems)
        ]

    def _run_tests(self, problem: CodeProblem, text: str) -> Drop | None:
        limits = Limits(self.timeout, max(1, round(self.timeout)))
        result = run_program(problem.program(text), problem.tests, limits)
        return None if result.passed else Drop("fails its tests", f"{result.status} {result.detail}".strip())

    def _compare(self, problem: CodeProblem | MathsProblem | None, text: str) -> Drop | None:
        if not isinstance(problem, MathsProblem):
            return Drop("nothing to check it by") if self.unverifiable == "drop" else None
        graded = grade(text, problem.answer)
        if graded.flexible:
            return None
        return Drop("wrong answer", f"{graded.answer or 'none'}, right is {problem.answer}")


def _problem_row(sample: Sample) -> Mapping[str, Any]:
    """The sample's row under the field names of mathematics and code problems."""
    prompt = sample.response.prompt
    right = {name: prompt.references[0] for name in ("answer", "code") if prompt.references}
    return {"prompt": prompt.question, **right, **prompt.facts}
