"""Tasks of mathematics and programming on their data sets' own rows."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import shared
from tests.evaluate.contexts import context

from stillhouse.data import Encoder
from stillhouse.errors import ConfigError, DataError
from stillhouse.evaluate.tasks import REGISTRY
from stillhouse.evaluate.tasks.code import pass_at_k
from stillhouse.grading import CodeProblem, grade, problem_of, run_program

KINDS = {
    "gsm8k": "math/gsm8k_test.jsonl",
    "svamp": "math/svamp_eval.jsonl",
    "math500": "math/math500_eval.jsonl",
    "humaneval": "code/humaneval.jsonl",
    "mbpp": "code/mbpp_test.jsonl",
}


def task(kind: str, path: Path | str, **options: Any) -> Any:
    source = {"kind": "jsonl", "path": str(path), "limit": 12}
    return REGISTRY.parse({"kind": kind, "data": source, "max_prompt": 4000, **options})


def examples_of(one: Any) -> Any:
    here = context()
    return one.load(Encoder(here.data.template, here.tokenizer), here.data).examples


def answer(kind: str, raw: dict[str, Any]) -> str:
    """The data set's own answer as a model would give it."""
    if kind == "humaneval":
        return str(raw["canonical_solution"])
    if kind == "mbpp":
        return f"Here it is:\n```python\n{raw['code']}\n```"
    value = raw["answer"]
    return str(value) if kind == "gsm8k" else f"It is $\\boxed{{{value}}}$."


def correct(raw: Any, response: str) -> bool:
    """By the grader alone, without a task."""
    problem = problem_of(raw)
    if isinstance(problem, CodeProblem):
        return run_program(problem.program(response), problem.tests).passed
    return grade(response, problem.answer).flexible


@pytest.mark.needs_shared
@pytest.mark.parametrize("kind", KINDS)
def test_the_data_sets_own_answers_are_right_and_those_to_other_questions_wrong(kind):
    one = task(kind, shared() / "data" / KINDS[kind])
    asked = examples_of(one)
    assert len(asked) == 12
    score = "passed" if kind in ("humaneval", "mbpp") else "accuracy"
    answers = [answer(kind, dict(example.row)) for example in asked]
    assert [scores[score] for scores in one.score_all(asked, answers)] == [1.0] * 12
    others = [scores[score] for scores in one.score_all(asked, answers[1:] + answers[:1])]
    assert sum(others) <= 1  # two small numbers may be the same
    assert all(correct(example.row, text) for example, text in zip(asked[:4], answers, strict=False))


@pytest.mark.needs_shared
def test_worked_examples_stand_before_the_question():
    data = shared() / "data"
    one = task("gsm8k", data / KINDS["gsm8k"], few_shot=2, few_shot_data=str(data / "math/gsm8k_train.jsonl"))
    text = examples_of(one)[0].prompt.text
    assert text.count("####") == 2
    assert text.index("####") < text.index("Janet")
    programs = task(
        "mbpp", data / KINDS["mbpp"], few_shot=3, few_shot_data=str(data / "code/mbpp_prompt.jsonl")
    )
    asked = examples_of(programs)[0]
    assert asked.prompt.text.count("[DONE]") == 3
    assert asked.prompt.text.rstrip().endswith("[BEGIN]")
    going_on = (
        f"{asked.row['code']}\n[DONE]\n\nWrite a Python function.\nAnother\n[BEGIN]\ndef x(): pass\n[DONE]"
    )
    assert programs.score(asked, going_on)["passed"] == 1.0
    with pytest.raises(DataError, match="10 rows, but few_shot is 11"):
        examples_of(
            task(
                "mbpp", data / KINDS["mbpp"], few_shot=11, few_shot_data=str(data / "code/mbpp_prompt.jsonl")
            )
        )


def rows(path: Path, *found: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def test_a_right_number_that_is_not_marked_counts_as_flexible_only(tmp_path):
    one = task("gsm8k", rows(tmp_path / "a.jsonl", {"question": "2 + 3?", "answer": "#### 5"}))
    (asked,) = examples_of(one)
    assert one.score(asked, "It makes 5.") == {"answer": "5", "accuracy": 0.0, "accuracy_flexible": 1.0}
    assert one.score(asked, "#### 5.0004")["accuracy"] == 1.0
    assert one.score(asked, "#### 5.01")["accuracy"] == 0.0
    assert one.score(asked, "#### 4\nQuestion: 1 + 4?\n#### 5")["accuracy"] == 0.0
    assert one.score(asked, r"\boxed{5}")["accuracy"] == 1.0
    assert one.score(asked, "") == {"answer": None, "accuracy": 0.0, "accuracy_flexible": 0.0}


def test_rows_of_another_shape_are_refused_with_their_place(tmp_path):
    for kind in KINDS:
        with pytest.raises(DataError, match=f"a.jsonl:1: {kind} needs"):
            examples_of(task(kind, rows(tmp_path / "a.jsonl", {"text": "x"})))


def test_problems_without_tests_are_refused(tmp_path):
    for kind, raw in (
        ("mbpp", {"text": "Add.", "test_list": []}),
        ("humaneval", {"prompt": "def f():", "entry_point": "f", "test": "assert True"}),
    ):
        with pytest.raises(DataError, match=r"a.jsonl:1: has no tests, so any program would pass"):
            examples_of(task(kind, rows(tmp_path / "a.jsonl", raw)))


PROBLEM = {
    "task_id": "x/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "test": "def check(c):\n    assert c() == 1",
}


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for samples in range(1, 7):
        for passed in range(samples + 1):
            for k in range(1, samples + 1):
                drawn = list(combinations([1] * passed + [0] * (samples - passed), k))
                expected = sum(any(choice) for choice in drawn) / len(drawn)
                assert pass_at_k(samples, passed, k) == pytest.approx(expected)
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(3, 1, 5)


def test_pass_at_k_pools_samples_and_seeds(tmp_path):
    one = task("humaneval", rows(tmp_path / "a.jsonl", PROBLEM), samples=2, k=[1, 3], seeds=[1, 2])
    (asked,) = examples_of(one)
    texts = ["    return 1\n", "    return 2\n", "    return 3\n", "    return 4\n"]
    scored = [{"id": "a:1", "seed": 1, **scores} for scores in one.score_all([asked] * 4, texts)]
    assert one.aggregate(scored) == {"pass_at_1": 0.25, "pass_at_3": 0.75, "stopped_by_limit": 0.0}
    with pytest.raises(ConfigError, match=r"at most 4 \(samples times seeds\)"):
        task("humaneval", tmp_path / "a.jsonl", samples=2, k=[5], seeds=[1, 2]).evaluate(context())


def test_a_model_is_measured_from_prompts_to_verdicts(tmp_path):
    sums = rows(tmp_path / "sums.jsonl", {"question": "2 + 3?", "answer": "#### 5"})
    programs = rows(tmp_path / "programs.jsonl", PROBLEM)
    short = {"temperature": 0.0, "max_tokens": 8}
    maths = task("gsm8k", sums, sampling=short).evaluate(context())
    code = task("humaneval", programs, sampling=short).evaluate(context())
    assert (maths.metrics["accuracy"], code.metrics["pass_at_1"]) == (0.0, 0.0)  # it writes about restaurants
    assert code.rows[0]["status"] == "failed"
    assert code.settings["programs"].startswith("confined")
    assert maths.settings["tolerance"] == 1e-3
