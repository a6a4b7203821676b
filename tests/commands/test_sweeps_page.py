"""The sweep of docs/ship.md runs and is compared, and a search draws, and goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import stillhouse
from stillhouse.report.comparison import comparison_text
from stillhouse.report.record import load_runs
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "ship.md").read_text(encoding="utf-8")
BLOCK = re.findall(r"```yaml\n# sweep\.yaml\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_sweep_of_the_page_runs_and_the_teacher_is_evaluated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree: dict[str, Any] = yaml.safe_load(BLOCK[0])
    tree["values"]["train.seed"] = [1]
    result = stillhouse.sweep(tree)
    names = [f"{size}-{recipe}-seed-1" for size in ("small", "wide") for recipe in ("kd", "skl")]
    assert result.states == dict.fromkeys(names, "done")
    text = comparison_text(load_runs([result.folder]), "markdown")
    assert "small-kd" in text
    assert "wide-skl" in text
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "What quality costs" in page
    lines = (result.folder / "shared" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    teacher = [line["taken"] for line in map(json.loads, lines) if line["what"] == "teacher"]
    assert sorted(teacher) == [False, True, True, True]


def test_methods_with_other_sampling_share_what_the_teacher_says(tmp_path: Path) -> None:
    """The teacher's text under its own sampling, and its evaluation, which has the sampling of `evaluate`."""
    tree: dict[str, Any] = yaml.safe_load(BLOCK[0])["run"]
    tree["data"]["train"]["limit"] = 4
    del tree["data"]["valid"]
    tree["train"] = {"epochs": 1, "batch_size": 4, "micro_batch_size": 4, "save_every": "never"}
    asked = {"temperature": 0.5, "max_tokens": 8}
    methods: dict[str, dict[str, Any]] = {
        "SeqKD": {"recipe": "seqkd", "responses": {"sampling": asked}},
        "DistiLLM-2": {
            "recipe": "distillm2_released", "responses": {"teacher_sampling": asked},
            "engine": {"sampling": {"max_tokens": 4}},
        },
    }  # fmt: skip
    for name, changes in methods.items():
        output = {"folder": str(tmp_path / name), "shared": str(tmp_path / "shared"), "report": False}
        stillhouse.run({**tree, "name": name, "output": output, **changes})
    lines = (tmp_path / "shared" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    assert [(line["run"], line["taken"]) for line in told if line["what"] == "teacher"] == [
        ("SeqKD", False), ("DistiLLM-2", True),
    ]  # fmt: skip
    assert [line["taken"] for line in told if line["what"] == "teacher-0"] == [False, True]


def test_a_search_draws_from_its_range_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree: dict[str, Any] = yaml.safe_load(BLOCK[0])
    del tree["variants"]
    tree["run"] |= {"recipe": "kd", "evaluate": {"before": False, "teacher": False}}
    tree["run"]["train"] |= {"validate_every": 1, "validate_rouge": False}
    tree |= {
        "values": {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        "search": {"kind": "optuna", "trials": 2, "seed": 1},
    }
    assert stillhouse.sweep(tree).count("done") == 2
    tree["search"]["trials"] = 3
    more = stillhouse.sweep(tree)
    assert more.count("done") == 3
    resolved = [path.read_text(encoding="utf-8") for path in (more.folder / "runs").glob("*/resolved.yaml")]
    rates = {yaml.safe_load(text)["train"]["lr"] for text in resolved}
    assert len(rates) == 3
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
