"""Several tasks for each system, in one run folder; an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.contexts import context
from tests.small_runs import in_child, nth, tree, write_data

from stillhouse.errors import ConfigError
from stillhouse.evaluate.tasks import REGISTRY
from stillhouse.report.record import load_run
from stillhouse.runs.execute import execute
from stillhouse.runs.resolve import resolve

EXACT = {"kind": "exact_match", "limit": 3, "seeds": [1, 2, 3], "sampling": {"temperature": 1.0}}


def run_tree(folder: Path, name: str, tasks: list[Any], **evaluate: Any) -> dict[str, Any]:
    write_data(folder)
    return tree(
        folder,
        name,
        objective="forward_kl",
        train={"max_steps": 1, "validate_every": "never"},
        evaluate={"before": False, "sampling": {"max_tokens": 8}, "tasks": tasks, **evaluate},
    )


def files(folder: Path) -> dict[str, Any]:
    """Results and answers, without what depends on the clock."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "evaluation").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        result["metrics"].pop("tokens_per_second")
        result.pop("label")
        found[path.name] = result
        found[path.with_suffix(".jsonl").name] = path.with_suffix(".jsonl").read_text(encoding="utf-8")
    return found


def test_each_task_has_a_file_pair_for_each_system(tmp_path: Path) -> None:
    own = {**EXACT, "data": str(tmp_path / "train.jsonl"), "name": "mine"}
    execute(resolve(run_tree(tmp_path, "run", [EXACT, own])))
    record = load_run(tmp_path / "run")
    assert {(one.system, one.task) for one in record.evaluations} == {
        (system, task)
        for system in ("teacher", "student after")
        for task in ("held-out prompts", "exact_match", "mine")
    }
    assert not record.problems
    mine = next(one for one in record.evaluations if (one.system, one.task) == ("teacher", "mine"))
    assert len(mine.rows) == 3 * 3
    assert {"id", "seed", "prompt", "references", "response", "tokens", "finished", "exact_match"} == set(
        mine.rows[0]
    )
    assert {"exact_match", "exact_match_std", "mean_length", "tokens_per_second"} <= set(mine.metrics)
    assert mine.settings["seeds"] == [1, 2, 3]
    assert mine.settings["sampling"]["max_tokens"] == 10  # data.max_response
    assert not (tmp_path / "run" / "evaluation" / ".partial").exists()


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    straight = run_tree(tmp_path, "straight", [EXACT])
    assert in_child(straight) == 0
    broken = {**straight, "output": {"folder": str(tmp_path / "broken"), "report": False}}
    assert in_child(broken, die=nth(3, "open", ".exact_match.jsonl")) < 0
    assert len(list((tmp_path / "broken" / "evaluation").glob(".partial/*.exact_match.jsonl"))) == 1
    assert in_child(broken, resume=True) == 0
    assert files(tmp_path / "broken") == files(tmp_path / "straight")
    assert not (tmp_path / "broken" / "evaluation" / ".partial").exists()


def test_what_was_written_before_an_interruption_is_not_written_again(tmp_path: Path) -> None:
    config = run_tree(tmp_path, "run", [EXACT])
    assert in_child(config, die=nth(3, "open", "teacher.exact_match.jsonl")) < 0
    kept = tmp_path / "run" / "evaluation" / ".partial" / "teacher.exact_match.jsonl"
    header, first, *rest = kept.read_text(encoding="utf-8").splitlines()
    piece = json.loads(first)
    piece["value"]["completions"][0][0] = [5, 6, 7]
    kept.write_text("\n".join([header, json.dumps(piece), *rest]) + "\n", encoding="utf-8")
    assert in_child(config, resume=True) == 0
    rows = kept.parent.parent / "teacher.exact_match.jsonl"
    assert json.loads(rows.read_text(encoding="utf-8").splitlines()[0])["tokens"] == 3


def test_answers_of_other_settings_are_not_reused(tmp_path: Path) -> None:
    first = run_tree(tmp_path, "one", [EXACT])
    assert in_child(first, die=nth(3, "open", "teacher.exact_match.jsonl")) < 0
    other = {**EXACT, "sampling": {"temperature": 0.5}}
    changed = {**first, "evaluate": {**first["evaluate"], "tasks": [other]}}
    assert in_child(changed, resume=True) == 0
    fresh = run_tree(tmp_path, "two", [other])
    assert in_child(fresh) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_what_is_done_is_done_again_only_if_something_changed(tmp_path: Path) -> None:
    config = run_tree(tmp_path, "run", [EXACT])
    execute(resolve(config))
    results = tmp_path / "run" / "evaluation"
    written = {path.name: path.stat().st_mtime_ns for path in results.iterdir()}
    execute(resolve(config), resume=True)
    assert {path.name: path.stat().st_mtime_ns for path in results.iterdir()} == written
    config["evaluate"]["tasks"] = [{**EXACT, "strict": True}]
    execute(resolve(config), resume=True)
    changed = {path.name for path in results.iterdir() if path.stat().st_mtime_ns != written[path.name]}
    assert changed == {
        f"{system}.exact_match.{ending}"
        for system in ("teacher", "student-after")
        for ending in ("json", "jsonl")
    }


def test_tasks_are_checked_before_anything_loads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'exact_match'"):
        resolve(run_tree(tmp_path, "run", ["exact_mach"]))
    with pytest.raises(ConfigError, match="two tasks are called exact_match"):
        resolve(run_tree(tmp_path, "run", [EXACT, EXACT]))
    with pytest.raises(ConfigError, match=r"evaluate.tasks\[0\].data: .*no such file"):
        execute(resolve(run_tree(tmp_path, "run", [{**EXACT, "data": str(tmp_path / "absent.jsonl")}])))
    assert not (tmp_path / "run").exists()


def test_a_single_changed_weight_makes_another_result() -> None:
    """A sample of the weights would miss it, and the answers of another model would be taken."""
    own = EXACT | {"data": "package:stillhouse/demo/data/dev.jsonl"}
    task = REGISTRY.parse(own)
    before = context()
    changed = copy.deepcopy(before.model)
    with torch.no_grad():
        changed.get_input_embeddings().weight[-1, -1] += 1e-3
    assert task.dependencies(context()) == task.dependencies(before)
    assert task.dependencies(context(model=changed)) != task.dependencies(before)
