"""Tasks on two processes: the harness says what it says on one, and times are measured by the first alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.children import ranks
from tests.evaluate.tasks.test_lm_eval import CHOICE, WRITTEN
from tests.small_runs import run, tree, write_data

from stillhouse.evaluate.tasks import EvalContext, TaskResult
from stillhouse.evaluate.tasks.base import REGISTRY
from stillhouse.evaluate.tasks.cost import InferenceCost
from stillhouse.evaluate.tasks.speculative import DraftModelQuality
from stillhouse.files import write_jsonl


class _Witnessed:
    """Leaves a file for each process that measures, with the number of processes it believes in."""

    def evaluate(self, context: EvalContext) -> TaskResult:
        name = f"{type(self).__name__}-{context.system}-{os.getpid()}".replace(" ", "-")
        Path(os.environ["WITNESSES"], name).write_text(f"{context.world.size} {os.environ['WORLD_SIZE']}")
        result: TaskResult = super().evaluate(context)  # type: ignore[misc]
        return result


class WitnessedCost(_Witnessed, InferenceCost):
    """`cost`."""

    kind: Literal["witnessed_cost"] = "witnessed_cost"  # type: ignore[assignment]


class WitnessedDraft(_Witnessed, DraftModelQuality):
    """`speculative`."""

    kind: Literal["witnessed_draft"] = "witnessed_draft"  # type: ignore[assignment]


def watched(tree: dict[str, Any]) -> None:
    for task in (WitnessedCost, WitnessedDraft):
        REGISTRY.register(task)
    run(tree)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One short run with all tasks, in one process and in two; by the number of processes."""
    folder = tmp_path_factory.mktemp("tasks")
    write_data(folder)
    rows = [
        {
            "question": f"{letter} is for",
            "choices": ["an apple", "a bread", "cake"],
            "right": place % 3,
            "answer": "bread",
        }
        for place, letter in enumerate("ABCDEFG")
    ]
    (folder / "own").mkdir()
    write_jsonl(folder / "rows.jsonl", rows)
    for name, text in (("choice", CHOICE), ("written", WRITTEN)):
        (folder / "own" / f"{name}.yaml").write_text(text.format(data=folder / "rows.jsonl"), "utf-8")
    tasks = [
        {"kind": "lm_eval", "tasks": ["which_food", "describe"], "folder": str(folder / "own")},
        {"kind": "witnessed_cost", "repeats": 1, "prompt_tokens": 8, "new_tokens": 4, "batch_size": 2},
        {
            "kind": "witnessed_draft",
            "limit": 2,
            "gammas": [2],
            "gamma": 2,
            "speed": False,
            "sampling": {"max_tokens": 6},
        },
    ]
    made = {}
    for count, name in ((1, "one"), (2, "two")):
        unmoved = {"max_steps": 1, "validate_every": "never", "lr": 1e-30}
        config = tree(folder, name, objective="forward_kl", train=unmoved)
        config["evaluate"] |= {"tasks": tasks, "batch_size": 2}
        witnesses = folder / f"witnesses-{name}"
        witnesses.mkdir()
        os.environ["WITNESSES"] = str(witnesses)
        try:
            assert ranks(count, watched, config) == [0] * count
        finally:
            del os.environ["WITNESSES"]
        made[name], made[f"{name} witnesses"] = folder / name / "evaluation", witnesses
    return made


def test_the_harness_says_on_two_processes_what_it_says_on_one(found: dict[str, Path]) -> None:
    for task in ("which_food", "describe"):
        one, two = (
            json.loads((found[n] / f"student-after.{task}.json").read_bytes()) for n in ("one", "two")
        )
        assert two["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            assert two["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        rows = [(found[n] / f"student-after.{task}.jsonl").read_text("utf-8") for n in ("one", "two")]
        assert len(rows[0].splitlines()) == 7
        assert rows[0] == rows[1]


def test_what_is_timed_is_timed_by_the_first_alone(found: dict[str, Path]) -> None:
    witnesses = sorted(found["two witnesses"].iterdir())
    assert [one.name.split("-")[0] for one in witnesses] == ["WitnessedCost", "WitnessedDraft"]
    assert {one.read_text() for one in witnesses} == {"1 1"}
    cost = json.loads((found["two"] / "student-after.witnessed_cost.json").read_bytes())["metrics"]
    assert cost["tokens_per_second"] > 0
    draft = json.loads((found["two"] / "student-after.witnessed_draft.json").read_bytes())["metrics"]
    assert 0 <= draft["acceptance_rate"] <= 1
