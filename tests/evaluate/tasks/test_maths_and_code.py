"""Tasks of mathematics and programming on their data sets' own rows."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import shared
from tests.evaluate.contexts import context

from stillhouse.errors import ConfigError, DataError
from stillhouse.evaluate.config import EvaluateConfig
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
    return one.load(one.encoder(here.data.template, here.tokenizer), here.data).examples


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
    with pytest.raises(DataError, match="10 rows, but few_shot is 11"):
        examples_of(
            task(
                "mbpp", data / KINDS["mbpp"], few_shot=11, few_shot_data=str(data / "code/mbpp_prompt.jsonl")
            )
        )


MBPP_ROW = {
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
}


def harness_prompt() -> str:
    """The prompt of lm-eval's mbpp, rendered from its own task file and examples (line ends as here)."""
    from lm_eval.utils import apply_template
    from tests.grading.test_completions import TaskFile, task_files

    folder = task_files().parent / "mbpp"
    found = yaml.load((folder / "mbpp.yaml").read_text("utf-8"), TaskFile)
    source = (folder / "utils.py").read_text("utf-8")
    names: dict[str, Any] = {}
    exec(source[source.index("def list_fewshot_samples") :], names)
    shots = [{**row, "code": row["code"].replace("\r\n", "\n")} for row in names["list_fewshot_samples"]()]
    assert found["num_fewshot"] == len(shots) == 3
    texts = [apply_template(found["doc_to_text"], row) for row in [*shots, MBPP_ROW]]
    answers = [found["target_delimiter"] + apply_template(found["doc_to_target"], row) for row in shots]
    return "".join(f"{text}{answer}\n\n" for text, answer in zip(texts, answers, strict=False)) + texts[-1]


def test_mbpp_asks_as_the_public_harness_does_word_for_word(tmp_path):
    one = task("mbpp", rows(tmp_path / "a.jsonl", MBPP_ROW))
    (asked,) = examples_of(one)
    assert asked.prompt.text == harness_prompt()
    assert asked.prompt.text.count("[DONE]") == 3
    going_on = f"{MBPP_ROW['code']}\n[DONE]\n\nYou are an expert\n[BEGIN]\ndef x(): pass\n[DONE]"
    assert one.score(asked, going_on)["passed"] == 1.0
    (chat,) = examples_of(task("mbpp", tmp_path / "a.jsonl", few_shot=0))
    assert "[" not in chat.prompt.text
    assert chat.prompt.text.endswith("== 0\n")


def test_a_humaneval_prompt_is_given_as_it_is(tmp_path):
    one = task("humaneval", rows(tmp_path / "a.jsonl", PROBLEM))
    (asked,) = examples_of(one)
    here = context()
    assert asked.prompt.text == PROBLEM["prompt"]
    assert list(asked.prompt.token_ids) == here.tokenizer(PROBLEM["prompt"])["input_ids"]
    (alpaca,) = examples_of(task("humaneval", tmp_path / "a.jsonl", template="alpaca"))
    assert alpaca.prompt.text.startswith("Below is an instruction")


@pytest.mark.parametrize("sampling", [None, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 1}])
def test_equal_samples_are_refused_before_anything_loads(tmp_path, sampling):
    data = str(rows(tmp_path / "a.jsonl", PROBLEM))
    for k, samples in (([1, 10], 10), ([1], 2)):
        one = {"kind": "humaneval", "data": data, "k": k, "samples": samples, "sampling": sampling}
        with pytest.raises(ValueError, match=r"equal programs.*Set sampling: \{temperature: 0.8"):
            EvaluateConfig(tasks=[one])
    few = {"kind": "mbpp", "data": data, "k": [3], "samples": 2, "sampling": {"temperature": 1.0}}
    with pytest.raises(ValueError, match=r"mbpp: pass@3 needs as many samples, and there are 2"):
        EvaluateConfig(tasks=[few | {"name": "mbpp"}])
    drawn = {"kind": "humaneval", "data": data, "k": [1, 2], "samples": 2}
    assert EvaluateConfig(tasks=[drawn], sampling={"temperature": 0.8}).expanded_tasks()
    assert EvaluateConfig(tasks=[{"kind": "humaneval", "data": data}], seeds=[1, 2]).expanded_tasks()


def rows(path: Path, *found: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def test_a_right_number_that_is_not_marked_counts_as_flexible_only(tmp_path):
    one = task("gsm8k", rows(tmp_path / "a.jsonl", {"question": "2 + 3?", "answer": "#### 5"}))
    (asked,) = examples_of(one)
    assert one.score(asked, "It makes 5.") == {"answer": "5", "accuracy": 0.0, "accuracy_flexible": 1.0}
    assert one.score(asked, "#### 5.0004")["accuracy"] == 0.0
    loose = task("gsm8k", tmp_path / "a.jsonl", tolerance=1e-3)
    assert loose.score(asked, "#### 5.0004")["accuracy"] == 1.0
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
    with pytest.raises(ConfigError, match=r"pass@5 needs as many samples, and there are 4"):
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
    assert maths.settings["tolerance"] == 5e-7
