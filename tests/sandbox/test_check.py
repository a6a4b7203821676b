"""Right programs pass, wrong ones fail, and the reference solutions of the data sets are right."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.grading.code import top_level_names
from stillhouse.sandbox import ProgramTests, SandboxUnavailable, check_program, confine, ensure_available
from stillhouse.sandbox.checker import free_names
from stillhouse.sandbox.protocol import Handle, NotTransferable, decode, encode
from tests.conftest import shared


def test_a_right_program_passes_and_a_wrong_one_says_where_it_failed():
    tests = ProgramTests("assert double(2) == 4")
    assert check_program("def double(x): return 2 * x", tests).passed
    wrong = check_program("def double(x): return 3 * x", tests)
    assert (wrong.passed, wrong.status, wrong.detail) == (False, "failed", "tests: AssertionError")
    broken = check_program("def double(x) return 2", tests)
    assert broken.detail.startswith("program: SyntaxError")
    assert "NameError" in check_program("x = 1", tests).detail


def test_the_function_of_an_entry_point_is_given_to_check():
    tests = ProgramTests(
        "def check(candidate):\n    assert candidate([1, (2,)], key={'a': {3}}) == [1, (2,), {'a': {3}}]", "f"
    )
    assert check_program("def f(items, key): return [*items, key]", tests).passed


def test_objects_of_the_program_can_be_made_used_and_changed_by_tests():
    program = (
        "class Node:\n    def __init__(self, v): self.v, self.left = v, None\n"
        "    def twice(self): return self.v * 2\n"
        "def depth(node): return 0 if node is None else 1 + depth(node.left)\n"
        "def numbers(n):\n    yield from range(n)\n"
    )
    tests = (
        "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2\nassert root.left.v == 2\n"
        "assert root.twice() == 2\nassert list(numbers(3)) == [0, 1, 2]\nassert Node(1) != Node(1)"
    )
    result = check_program(program, ProgramTests(tests))
    assert result.passed, result


def test_exceptions_of_the_program_reach_the_tests_as_what_they_are():
    tests = "try: f()\nexcept ValueError as error: assert str(error) == 'no'\nelse: raise AssertionError"
    assert check_program("def f(): raise ValueError('no')", ProgramTests(tests)).passed


def test_a_builtin_is_taken_from_the_program_only_where_the_tests_say_so():
    program = "def len(x): return 3\ndef f(): return [1]"
    assert check_program(program, ProgramTests("assert len(f()) == 1")).passed
    assert check_program(program, ProgramTests("assert len(f()) == 3", overrides=("len",))).passed


def test_helpers_of_the_tests_are_never_the_programs_own():
    """The tests of HumanEval 32, 38 and 50 call functions of the prompt, which a program may redefine."""
    helpers = "def shift(text): return text[1:] + text[:1]\n"
    tests = "def check(candidate):\n    assert candidate(shift('abc')) == 'abc'\n"
    wrong = "def shift(text): return text\ndef back(text): return text\n"
    right = "def shift(text): return text\ndef back(text): return text[-1:] + text[:-1]\n"
    asked = ProgramTests(tests, "back", helpers=helpers)
    assert [check_program(program, asked).passed for program in (wrong, right)] == [False, True]
    assert check_program("def back(text): return 0", ProgramTests(tests, "back")).status == "failed"


def test_modules_that_tests_name_are_those_of_the_library():
    program = "class math:\n    @staticmethod\n    def isclose(a, b): return True\ndef f(): return 1\n"
    assert not check_program(program, ProgramTests("assert math.isclose(f(), 2)")).passed
    assert check_program("def f(): return 2", ProgramTests("assert math.isclose(f(), 2)")).passed
    # A function may have a module's name.
    assert check_program("def select(x): return x", ProgramTests("assert select(3) == 3")).passed


def test_names_that_tests_define_themselves_are_not_asked_for():
    source = "import math\ndef g(a):\n    return [b for b in a]\nassert math.isclose(f(g([1])), h)\n"
    assert free_names(source) == {"f", "h"}


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
        st.complex_numbers(allow_nan=False),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(st.text(), inner, max_size=3),
        st.frozensets(st.integers(), max_size=3), st.sets(st.text(), max_size=3),
    ),
    max_leaves=8,
)  # fmt: skip


@given(values)
def test_builtin_values_cross_as_what_they_are(value):
    def keep(_: object) -> Handle:
        raise AssertionError("a builtin value must cross")

    there = decode(json.loads(json.dumps(encode(value, keep))), lambda handle: handle)
    assert there == value
    assert type(there) is type(value)


@pytest.mark.parametrize(
    "data", [["tuple"], ["what", []], ["dict", [1]], [], ["set", [["list", []]]], {"a": 1}]
)
def test_data_that_is_no_value_is_refused(data):
    with pytest.raises(NotTransferable):
        decode(data, lambda handle: handle)


def test_a_machine_that_cannot_confine_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(confine, "landlock_version", lambda: 0)
    with pytest.raises(SandboxUnavailable, match="Landlock"):
        ensure_available()
    monkeypatch.setattr(confine, "landlock_version", lambda: 1)
    monkeypatch.setattr(confine, "libseccomp", lambda: None)
    with pytest.raises(SandboxUnavailable, match="libseccomp2"):
        check_program("x = 1", ProgramTests("assert x == 1"))


def test_the_sandbox_imports_the_standard_library_and_itself_only():
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(confine.__file__).parents[2])!r})\n"
        "from stillhouse.sandbox import checker, confine, supervisor, worker\n"
        "tops = {name: name.partition('.')[0] for name in sys.modules}\n"
        "print(*(name for name, top in tops.items() if top not in sys.stdlib_module_names))"
    )
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert "stillhouse.sandbox.worker" in loaded
    others = {name for name in loaded if not name.startswith(("stillhouse.sandbox", "_"))}
    assert others == {"stillhouse"}


def _references() -> list[tuple[str, str, ProgramTests]]:
    rows = [json.loads(line) for line in (shared() / "data/code/humaneval.jsonl").open(encoding="utf-8")]
    found = [
        (
            row["task_id"],
            row["prompt"] + row["canonical_solution"],
            ProgramTests(row["test"], row["entry_point"]),
        )
        for row in rows
    ]
    for row in map(json.loads, (shared() / "data/code/mbpp_test.jsonl").open(encoding="utf-8")):
        tests = ProgramTests(
            "\n".join([row["test_setup_code"], *row["test_list"]]), overrides=top_level_names(row["code"])
        )
        found.append((f"MBPP/{row['task_id']}", row["code"], tests))
    return found


@pytest.mark.needs_shared
def test_reference_solutions_pass_and_fail_when_their_results_are_changed():
    everything = _references()
    chosen = random.Random(0).sample(everything, 15)
    # Those that need more than plain functions: helpers, classes, a builtin that is defined anew.
    chosen += [one for one in everything if one[0] in ("HumanEval/32", "MBPP/126", "MBPP/367")]
    for name, program, tests in chosen:
        assert check_program(program, tests).passed, name
        names = [*top_level_names(program)]
        broken = program + "".join(f"\ndef {name}(*a, **k): return 'wrong'" for name in names)
        assert not check_program(broken, tests).passed, name
