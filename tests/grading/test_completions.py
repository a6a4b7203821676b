"""A committed set of completions to one HumanEval prompt: our verdict beside those of the public harnesses.

The harnesses' rules are applied here to the same texts: lm-eval's stop words and its rule for chat models are
read from its own task files. Where our verdict differs, the row says why.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from stillhouse.grading import problem_of
from stillhouse.grading.problems import CodeProblem

PROMPT = (
    "from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n"
    '    """ The sum of all numbers.\n    >>> total([1, 2])\n    3\n    """\n'
)
ROW = {
    "task_id": "Own/0",
    "prompt": PROMPT,
    "entry_point": "total",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
BODY = "    result = 0\n    for number in numbers:\n        result += number\n    return result\n"
WRONG = "    return numbers[0]\n"
WHOLE = f"def total(numbers: List[int]) -> int:\n{BODY}"
AGAIN = f"\n\ndef total(numbers):\n{WRONG}"


@dataclass(frozen=True)
class Case:
    """A completion, whether it passes here, in lm-eval's humaneval, and in its task for chat models."""

    text: str
    ours: bool
    lm_eval: bool
    instruct: bool
    why: str = ""
    """Why ours differs from lm-eval's humaneval."""


CHAT = "a chat model's fences are no part of the program"
CASES = {
    "a body": Case(BODY, True, True, True),
    "a wrong body": Case(WRONG, False, False, False),
    "nothing": Case("", False, False, False),
    "a body cut in the middle": Case(BODY[:40], False, False, False),
    "a body that ends without a line break": Case(BODY.rstrip(), True, True, True),
    "a body after an empty line": Case(f"\n{BODY}", True, True, True),
    "a body in tabs": Case("\treturn sum(numbers)\n", False, False, False, "the prompt is in spaces"),
    "a body, then the same function again": Case(BODY + AGAIN, True, True, False),
    "a body, then another function": Case(f"{BODY}\ndef other():\n    pass\n", True, True, True),
    "a body, then a class": Case(f"{BODY}\nclass Other:\n    x: broken(\n", True, True, False),
    "a body, then prints": Case(f"{BODY}\nprint(total([1]))\nprint(1 / 0)\n", True, True, False),
    "a body, then a comment and prose": Case(f"{BODY}\n# Explanation\nIt adds.\n", True, True, False),
    "a body, then a main block": Case(f"{BODY}\nif __name__:\n    broken(\n", True, True, False),
    "a body, then an assertion that is wrong": Case(
        f"{BODY}\nassert total([1]) == 7\n", True, False, False, "bigcode's and Codex's follow-ups stop too"
    ),
    "a body, then a decorated function": Case(
        f"{BODY}\n@lost\ndef other():\n    pass\n", True, False, False, "bigcode's harness stops at @"
    ),
    "a body, then a closing fence and prose": Case(
        f"{BODY}```\n\nThis adds the numbers.\n", True, False, True, "bigcode's harness stops at a fence"
    ),
    "a body, then a fence and the function again": Case(
        f"{BODY}```\n\nOr:\n\n```python\ndef total(numbers):\n{WRONG}```\n", True, False, True, CHAT
    ),
    "a body, then prose": Case(
        f"{BODY}\nThis function adds the numbers.\nIt is fast.\n", True, False, False, "the program is right"
    ),
    "a wrong body, then the right function": Case(WRONG + f"\n\n{WHOLE}", False, False, True),
    "a body after a comment at the margin": Case(f"# Add all.\n{BODY}", True, True, True),
    "a body after an empty line and a comment": Case(
        f"\n# Add all.\n{BODY}", True, False, True, "nothing has begun that the comment could end"
    ),
    "a body after two comments at the margin": Case(
        f"# Add all.\n# Slowly.\n{BODY}", True, False, True, "nothing has begun that the comment could end"
    ),
    "a comment alone": Case("# TODO\n", False, False, False),
    "a comment at the margin within the body": Case(
        "    result = sum(numbers)\n# return it\n    return result\n", False, False, True
    ),
    "a docstring of its own": Case(f'    """Adds."""\n{BODY}', True, True, True),
    "a text at the margin within quotes": Case(
        '    text = """\nnot code\n"""\n    return sum(numbers)\n', True, True, True
    ),
    "a body at the margin": Case("return sum(numbers)\n", False, False, False),
    "prose": Case("I cannot do that.\n", False, False, False),
    "the signature repeated": Case(WHOLE, True, True, True),
    "imports and the signature repeated": Case(
        f"from typing import List\n\n{WHOLE}", True, False, True, "a whole program, not cut to its imports"
    ),
    "the signature repeated after an empty line": Case(
        f"\n{WHOLE}", True, False, True, "a whole program: the cut would leave nothing"
    ),
    "the signature repeated, then a helper": Case(
        "def total(numbers):\n    return add(numbers)\n\n\ndef add(numbers):\n    return sum(numbers)\n",
        True, False, True, "a whole program has several functions",
    ),
    "a helper, then the function": Case(
        "def add(numbers):\n    return sum(numbers)\n\n\ndef total(numbers):\n    return add(numbers)\n",
        True, False, True, "a whole program has several functions",
    ),
    "the function, then prose": Case(
        f"{WHOLE}\nThis function adds.\n", True, False, False, "the program is right"
    ),
    "the function and a main block": Case(
        f"{WHOLE}\nif __name__ == '__main__':\n    print(total([1]))\n", True, True, True
    ),
    "the function, a closing fence and prose": Case(
        f"{WHOLE}```\n\nIt adds:\n\n```\ntotal([1])\n```\n", True, False, True, CHAT
    ),
    "a fenced function": Case(f"```python\n{WHOLE}```\n", True, False, False, CHAT),
    "a fenced function with words around": Case(
        f"Sure! Here it is:\n\n```python\n{WHOLE}```\n\nIt adds the numbers.", True, False, False, CHAT
    ),
    "a fence tagged py": Case(f"```py\n{WHOLE}```", True, False, False, CHAT),
    "a fence tagged Python in capitals": Case(f"```Python\n{WHOLE}```", True, False, False, CHAT),
    "a fence with attributes": Case(f"```{{.python}}\n{WHOLE}```", True, False, False, CHAT),
    "a fence without a tag": Case(f"```\n{WHOLE}```", True, False, False, CHAT),
    "a fence in a list": Case(
        "1. Code:\n\n   ```python\n" + "".join(f"   {line}\n" for line in WHOLE.splitlines()) + "   ```\n",
        True, False, False, CHAT,
    ),
    "a fence that is never closed": Case(f"```python\n{WHOLE}", True, False, False, CHAT),
    "a fenced body": Case(f"```python\n{BODY}```", True, False, False, CHAT),
    "a fenced body at the margin": Case("```python\nreturn sum(numbers)\n```", True, False, False, CHAT),
    "a fenced function with imports": Case(
        f"```python\nimport math\n\n\n{WHOLE}```", True, False, False, CHAT
    ),
    "a shell block first": Case(
        f"```bash\npip install x\n```\n\n```python\n{WHOLE}```", True, False, False, CHAT
    ),
    "an example block first": Case(
        f"```python\ntotal([1])\n```\n\n```python\n{WHOLE}```", True, False, False, CHAT
    ),
    "a wrong fenced function": Case(f"```python\ndef total(numbers):\n{WRONG}```", False, False, False),
    "a fenced function with another name": Case(
        "```python\ndef add(numbers):\n    return sum(numbers)\n```", False, False, False
    ),
}  # fmt: skip


def task_files() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks" / "humaneval"


class TaskFile(yaml.SafeLoader):
    """Reads a task of lm-eval without its functions."""


TaskFile.add_constructor("!function", lambda loader, node: None)


def lm_eval_program(text: str) -> str:
    """As `humaneval` builds it: generation ends at a stop word, `build_predictions` adds the prompt."""
    task = yaml.load((task_files() / "humaneval.yaml").read_text("utf-8"), TaskFile)
    for stop in task["generation_kwargs"]["until"]:
        text = text.split(stop, 1)[0]
    return PROMPT + text


def instruct_program(text: str) -> str:
    """As `humaneval_instruct` builds it (`build_predictions_instruct`): up to the first fence."""
    assert 'r.find("```")' in (task_files() / "utils.py").read_text("utf-8")
    return PROMPT + text.split("```", 1)[0]


def passes(program: str) -> bool:
    """As the harnesses run a program: with its tests behind it. These programs are our own."""
    source = f"{program}\n{ROW['test']}\ncheck({ROW['entry_point']})\n"
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "program"})
    except Exception:  # noqa: BLE001 - whatever it raises, it fails
        return False
    return True


@pytest.mark.parametrize("name", CASES)
def test_our_verdict_and_those_of_the_public_harnesses(name):
    case = CASES[name]
    problem = problem_of(ROW)
    assert isinstance(problem, CodeProblem)
    programs = (problem.program(case.text), lm_eval_program(case.text), instruct_program(case.text))
    assert tuple(map(passes, programs)) == (case.ours, case.lm_eval, case.instruct)


def test_a_difference_has_a_reason():
    assert all(bool(case.why) >= (case.ours != case.lm_eval) for case in CASES.values())
    assert not [name for name, case in CASES.items() if case.lm_eval and not case.ours]
