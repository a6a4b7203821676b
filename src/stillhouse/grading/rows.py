"""What a row of a data set says about the right answer, and whether a text gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import isfinite
from typing import Any

from stillhouse.grading import programs
from stillhouse.grading.maths import after_mark, grade
from stillhouse.sandbox import Checks, Limits, check_program


@dataclass(frozen=True, slots=True)
class Code:
    """A problem whose answer is a program.

    Example: `Code(checks=Checks("assert f(2) == 4"), prompt="def f(x):", entry_point="f")`
    """

    checks: Checks
    prompt: str = ""
    """The beginning of the program, which an answer may go on with."""
    entry_point: str | None = None

    def program(self, text: str) -> str:
        """The program that a text stands for."""
        if self.entry_point is not None:
            return programs.program(self.prompt, text, self.entry_point)
        return programs.marked(text)


@dataclass(frozen=True, slots=True)
class Value:
    """A problem whose answer is a number or an expression. Example: `Value("18")`"""

    reference: str


def problem_of(raw: Mapping[str, Any]) -> Code | Value | None:
    """What a row asks for: a program with tests (fields of HumanEval or MBPP), a value (GSM8K's `####`, a
    number under `answer`, or any other short `answer`), or nothing that can be checked."""
    if "entry_point" in raw and "test" in raw:
        entry, test = str(raw["entry_point"]), str(raw["test"])
        # Without a check of their own the tests would take the program's.
        there = "check" in programs.definitions(test)
        return Code(Checks(test, entry), str(raw.get("prompt", "")), entry) if there else None
    if "test_list" in raw:
        names = programs.definitions(str(raw.get("code", "")))
        tests = [str(test) for test in raw["test_list"] if str(test).strip()]
        setup = str(raw.get("test_setup_code") or "")
        return Code(Checks("\n".join([setup, *tests]), provides=names)) if tests else None
    answer = raw.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    if isinstance(answer, str):
        reference = after_mark(answer) or answer.strip()
        return Value(reference) if reference else None
    return Value(f"{Decimal(repr(answer)):f}") if isfinite(answer) else None


def right(raw: Mapping[str, Any], text: str, limits: Limits | None = None) -> bool | None:
    """Whether a text answers a row rightly; None where the row has nothing to check it by.

    Raises:
        EnvironmentFault: a program would have to be run, and cannot be confined here.
    """
    problem = problem_of(raw)
    if isinstance(problem, Code):
        return check_program(problem.program(text), problem.checks, limits).passed
    return None if problem is None else grade(text, problem.reference).flexible
