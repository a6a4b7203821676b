"""DistiLLM-2 as the paper has it: its curricula run, and its ablations are what the recipe's header says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import ROOT
from tests.devices import WITHOUT_GPU
from tests.small_runs import STUDENT, TEACHER, in_child, in_two, rows_of, tree, write_data

from stillhouse import recipes
from stillhouse.runs.resolve import resolve

LENGTH = {"max_steps": 9, "batch_size": 6, "micro_batch_size": 3, "lr": 3e-3, "log_every": 1}
"""Three epochs of three steps."""
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def ablations() -> dict[str, list[str]]:
    """The lines of the recipe's header: name -> what is set on the command line."""
    header = recipes.find("distillm2").header
    lines = header[header.index("Ablations") :].splitlines()[1:4]
    found = {}
    for line in lines:
        name, _, settings = line.strip().partition(":")
        found[name] = re.findall(r"\S+=\S+", settings)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("distillm2")
    write_data(made, rows=18)
    return made


def test_the_header_has_the_ablations_of_table_5() -> None:
    assert list(ablations()) == ["contrastive only", "+ alpha", "+ beta"]


def test_the_page_shows_what_recipe_and_header_say(folder: Path) -> None:
    page = (ROOT / "docs" / "distillm2.md").read_text(encoding="utf-8")
    for line in ablations().values():
        assert " ".join(["stillhouse run run.yaml", *line]) in page
    start, shown = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    objective = resolve({**yaml.safe_load(start), "train": {"max_steps": 5}}).config.objective
    bare = {"student": {"path": "s"}, "data": {"train": "t.jsonl"}}
    bare["teacher"] = {"kind": "live", "path": "t"}
    pairs = {"responses": {"kind": "pairs"}, "train": {"epochs": 3.0}}
    assert resolve({**bare, **pairs, **yaml.safe_load(shown)}).config.objective == objective


@pytest.mark.parametrize(
    ("name", "alpha", "beta"),
    [
        ("contrastive only", False, False),
        ("+ alpha", True, False),
        ("+ beta", False, True),
        ("all", True, True),
    ],
)
def test_an_ablation_switches_what_it_names(folder: Path, name: str, alpha: bool, beta: bool) -> None:
    settings = [] if name == "all" else ablations()[name]
    objective = resolve(tree(folder, "x", recipe="distillm2", train=LENGTH), settings).config.objective
    assert objective.kind == "contrastive"
    assert (objective.alpha_rule == "gap") is alpha
    assert (objective.student_share != 0.5) is beta


def test_both_curricula_move_in_a_run(folder: Path) -> None:
    assert in_child(tree(folder, "all", recipe="distillm2", train=LENGTH)) == 0
    rows = [row for row in rows_of(folder / "all") if row["phase"] == "train"]
    beta = [row["schedule/objective.student_share"] for row in rows]
    assert beta == pytest.approx([max(0.5, step / 9) for step in range(9)])
    for side in ("teacher", "student"):
        reference = [row[f"schedule/objective.{side}_gap"] for row in rows]
        measured = [row[f"gap/{side}"] for row in rows]
        assert reference[:3] == [0, 0, 0]
        assert reference[3:6] == pytest.approx([max(0.0, sum(measured[:3]) / 3)] * 3)
        assert reference[6:] == pytest.approx([max(0.0, sum(measured[3:6]) / 3)] * 3)
    assert all(row["responses/student"] == row["responses/teacher"] == 0.5 for row in rows)


def test_two_processes_have_the_curriculum_of_one(folder: Path) -> None:
    """The means are over all ranks: both runs write the same texts and follow the same references."""
    train: dict[str, Any] = {**LENGTH, "validate_every": "never"}
    changes: dict[str, Any] = {
        "objective": {"teacher_gap": "batch", "alpha_least": 0.001, "alpha_most": 0.9, "alpha": 0.5},
        "student": {"tokenizer": TEACHER, "from_config": {**STUDENT, **WITHOUT_DROPOUT}},
        # In bfloat16 what the teacher says depends on what else is in its batch.
        "teacher": {"kind": "live", "path": TEACHER, "dtype": "float32"},
    }
    alone = tree(folder, "one", recipe="distillm2", train=train, **changes)
    assert in_child(alone, env=WITHOUT_GPU) == 0  # as the two
    train["hf"] = {"ddp_backend": "gloo"}
    assert in_two(tree(folder, "two", recipe="distillm2", train=train, **changes)) == [0, 0]
    one, two = (rows_of(folder / name) for name in ("one", "two"))
    for alone, together in zip(one, two, strict=True):
        for name in ("gap/teacher", "gap/student", "schedule/objective.student_gap", "loss"):
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-6), name


def test_the_released_recipe_has_both_curricula_off(folder: Path) -> None:
    objective = resolve(tree(folder, "x", recipe="distillm2_released", train=LENGTH)).config.objective
    assert objective.alpha_rule == "fixed"
    assert objective.source_weights() == {"teacher": 1.0, "student": 1.0}
    assert objective.detach_mixture
