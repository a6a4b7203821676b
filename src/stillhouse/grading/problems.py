"""Problems whose answers a program can grade, read from the rows of the published data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import isfinite
from typing import Any

from stillhouse.grading.code import humaneval_program, mbpp_program, top_level_names
from stillhouse.grading.maths import gsm8k_answer
from stillhouse.sandbox import ProgramTests


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """A problem whose answer is a program.

    Example: `CodeProblem(ProgramTests("assert f(2) == 4"), prompt="def f(x):", entry_point="f")`
    """

    tests: ProgramTests
    prompt: str = ""
    """The beginning of the program, which a response may complete."""
    entry_point: str | None = None

    def program(self, response: str) -> str:
        """The program in a response."""
        if self.entry_point is not None:
            return humaneval_program(self.prompt, response, self.entry_point)
        return mbpp_program(response)


@dataclass(frozen=True, slots=True)
class MathsProblem:
    """A problem whose answer is a number or an expression. Example: `MathsProblem("18")`"""

    answer: str


def problem_of(raw: Mapping[str, Any]) -> CodeProblem | MathsProblem | None:
    """The problem in a row; None if the row has nothing to grade a response by.

    Code has the fields of HumanEval or MBPP; mathematics has `answer`, with GSM8K's `####`, a number or any
    other short text.
    """
    if "entry_point" in raw and "test" in raw:
        entry_point, source = str(raw["entry_point"]), str(raw["test"])
        # Without a `check` of their own the tests would call the program's.
        if "check" not in top_level_names(source):
            return None
        return CodeProblem(ProgramTests(source, entry_point), str(raw.get("prompt", "")), entry_point)
    if "test_list" in raw:
        tests = [str(test) for test in raw["test_list"] if str(test).strip()]
        setup = str(raw.get("test_setup_code") or "")
        names = top_level_names(str(raw.get("code", "")))
        return CodeProblem(ProgramTests("\n".join([setup, *tests]), overrides=names)) if tests else None
    answer = raw.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    if isinstance(answer, str):
        answer = gsm8k_answer(answer) or answer.strip()
        return MathsProblem(answer) if answer else None
    return MathsProblem(f"{Decimal(repr(answer)):f}") if isfinite(answer) else None
