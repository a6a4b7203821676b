"""Programs in a model's text."""

from __future__ import annotations

import pytest

from stillhouse.errors import EnvironmentFault
from stillhouse.grading import require_sandbox, run_program
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
