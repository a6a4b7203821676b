"""Problems whose answers a program can grade, read from the rows of the published data sets."""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import isfinite
from typing import Any

from stillhouse.grading.code import humaneval_program, mbpp_program, prompt_helpers, top_level_names
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
    """The function of HumanEval's `check`."""
    function: str | None = None
    """The function that MBPP's tests call, where it is known."""

    def program(self, response: str) -> str:
        """The program in a response."""
        if self.entry_point is not None:
            return humaneval_program(self.prompt, response, self.entry_point)
        return mbpp_program(response, self.function)


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
        prompt = str(raw.get("prompt", ""))
        helpers = prompt_helpers(prompt, entry_point)
        return CodeProblem(ProgramTests(source, entry_point, helpers=helpers), prompt, entry_point)
    if "test_list" in raw:
        tests = [str(test) for test in raw["test_list"] if str(test).strip()]
        source = "\n".join([str(raw.get("test_setup_code") or ""), *tests])
        function = _tested_function(source, top_level_names(str(raw.get("code", ""))))
        overrides = () if function is None else (function,)
        return CodeProblem(ProgramTests(source, overrides=overrides), function=function) if tests else None
    answer = raw.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    if isinstance(answer, str):
        answer = gsm8k_answer(answer) or answer.strip()
        return MathsProblem(answer) if answer else None
    return MathsProblem(f"{Decimal(repr(answer)):f}") if isfinite(answer) else None


def _tested_function(tests: str, names: tuple[str, ...]) -> str | None:
    """Which of the reference solution's names the tests call; of several the last that is no builtin."""
    called = [name for name in names if re.search(rf"\b{re.escape(name)}\s*\(", tests)]
    own = [name for name in called if not hasattr(builtins, name)]
    return next(iter((own or called)[-1:]), None)
