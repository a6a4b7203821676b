"""Programs in a model's text."""

from __future__ import annotations

import time

import pytest

from stillhouse.errors import EnvironmentFault
from stillhouse.grading import CodeProblem, problem_of, require_sandbox, run_program
from stillhouse.grading.code import code_block, completed_prompt, humaneval_program, top_level_names
from stillhouse.sandbox import ProgramTests, confine

PROMPT = 'import math\n\ndef area(r):\n    """Area of a circle."""\n'


def test_a_body_goes_on_with_the_prompt_until_something_else_begins():
    text = "    return math.pi * r ** 2\n\nprint(area(2))\n\ndef other():\n    pass\n"
    assert completed_prompt(PROMPT, text) == PROMPT + "    return math.pi * r ** 2\n\n"


def test_a_fenced_block_that_defines_the_function_is_the_program():
    blocks = [
        "```bash\nls\n```",
        "```python\nx = 1\n```",
        "```python\ndef area(r):\n    return 3 * r * r\n```",
    ]
    text = "\n".join(["Sure:", *blocks, "Done."])
    assert humaneval_program(PROMPT, text, "area") == "import math\n\n\ndef area(r):\n    return 3 * r * r\n"


def test_a_fenced_body_goes_on_with_the_prompt():
    assert humaneval_program(PROMPT, "```python\n    return 3\n```", "area") == PROMPT + "    return 3\n"


def test_an_unclosed_fence_counts_to_the_end():
    assert code_block("```python\ndef f(): pass") == "def f(): pass"
    assert code_block("no code") is None


def test_definitions_are_those_at_the_top():
    assert top_level_names("def a(): pass\nclass B:\n    def c(self): pass\nd = 1") == ("a", "B")
    assert top_level_names("def broken(") == ()


def test_a_machine_without_a_sandbox_is_a_fault_of_the_environment(monkeypatch):
    monkeypatch.setattr(confine, "landlock_version", lambda: 0)
    with pytest.raises(EnvironmentFault, match="Landlock"):
        require_sandbox()
    with pytest.raises(EnvironmentFault, match="Landlock"):
        run_program("x = 1", ProgramTests("assert x == 1"))


def humaneval(test: str, prompt: str = PROMPT) -> CodeProblem:
    problem = problem_of({"prompt": prompt, "entry_point": "area", "test": test})
    assert isinstance(problem, CodeProblem)
    return problem


def test_helper_functions_come_from_the_prompt():
    test = "def check(candidate):\n    assert candidate(half(4)) == 12\n"
    helper = "def half(x):\n    return x / 2\n\n\n"
    problem = humaneval(test, helper + PROMPT)
    cheat = "def half(x):\n    return 0\n\n\ndef area(r):\n    return 12\n"
    assert not run_program(
        "def half(x): return 0\ndef area(r): return 12 if r == 0 else 0", problem.tests
    ).passed
    right = problem.program("    return 3 * r ** 2\n")
    assert run_program(right, problem.tests).passed
    assert problem.program(cheat).startswith(helper)


def test_a_prompt_in_words_is_no_part_of_the_program():
    test = "def check(candidate):\n    assert candidate(2) == 12\n"
    problem = humaneval(test, "Write a function area(r), and nothing else.")
    program = problem.program("```python\ndef area(r):\n    return 3 * r ** 2\n```")
    assert run_program(program, problem.tests).passed


def test_a_reference_that_defines_a_builtin_lends_it_only_where_it_is_what_is_tested():
    """The tests of a task that is about `sum` call the program's `sum`, those about another their own."""
    tested = problem_of({"test_list": ["assert sum(10, 15) == 6"], "code": "def sum(a, b):\n    return 6"})
    code = "def abs(x):\n    return 0\ndef gap(x):\n    return abs(x)"
    beside = problem_of({"test_list": ["assert abs(gap(3) - 3) < 1"], "code": code})
    assert isinstance(tested, CodeProblem)
    assert isinstance(beside, CodeProblem)
    assert run_program("def sum(a, b): return 6", tested.tests).passed
    assert not run_program("def abs(x): return 0\ndef gap(x): return 70", beside.tests).passed
    assert run_program("def gap(x): return x", beside.tests).passed


def test_programs_of_mbpp():
    code = "def remove(s):\n    return s[1:]\n"
    texts = [
        code, f"{code}[DONE]\n\nAnother task", f"[BEGIN]\n{code}[DONE]",
        f"Here:\n```python\n{code}```\nDone.",
        f"```python\nremove('x')\n```\n```python\n{code}```", f"{code}\nIt removes one.\nYes.\n",
        f"{code}```\nIt removes one.", code.replace("\n", "\r\n"),
    ]  # fmt: skip
    problem = problem_of({"test_list": ["assert remove('abc') == 'bc'"], "code": code})
    assert isinstance(problem, CodeProblem)
    assert all(run_program(problem.program(text), problem.tests).passed for text in texts)


def test_a_long_text_that_is_no_program_costs_little_time():
    start = time.process_time()
    assert (
        not humaneval("def check(c):\n    assert c\n").program("    x = (\nbroken\n" * 20_000).endswith("}")
    )
    assert time.process_time() - start < 20
