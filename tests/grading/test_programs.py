"""Programs in a model's text."""

from __future__ import annotations

from stillhouse.grading.programs import continued, definitions, fenced, program

PROMPT = 'import math\n\ndef area(r):\n    """Area of a circle."""\n'


def test_a_body_goes_on_with_the_prompt_until_something_else_begins():
    text = "    return math.pi * r ** 2\n\nprint(area(2))\n\ndef other():\n    pass\n"
    assert continued(PROMPT, text) == PROMPT + "    return math.pi * r ** 2\n\n"


def test_a_fenced_block_that_defines_the_function_is_the_program():
    blocks = [
        "```bash\nls\n```",
        "```python\nx = 1\n```",
        "```python\ndef area(r):\n    return 3 * r * r\n```",
    ]
    text = "\n".join(["Sure:", *blocks, "Done."])
    assert program(PROMPT, text, "area") == "import math\n\n\ndef area(r):\n    return 3 * r * r\n"


def test_a_fenced_body_goes_on_with_the_prompt():
    assert program(PROMPT, "```python\n    return 3\n```", "area") == PROMPT + "    return 3\n"


def test_an_unclosed_fence_counts_to_the_end():
    assert fenced("```python\ndef f(): pass") == "def f(): pass"
    assert fenced("no code") is None


def test_definitions_are_those_at_the_top():
    assert definitions("def a(): pass\nclass B:\n    def c(self): pass\nd = 1") == ("a", "B")
    assert definitions("def broken(") == ()
