"""Runs whose student starts from a part of its teacher, chosen on the run's own data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import stillhouse
from stillhouse.commands.app import app
from stillhouse.config import to_yaml
from stillhouse.errors import ConfigError
from stillhouse.runs.resolve import resolve
from tests.conftest import ROOT, script
from tests.small_runs import differences, in_child, in_two, nth, outcome, tree, write_data

PRUNE = {"layers": 3, "intermediate_size": 48, "num_key_value_heads": 1, "rows": 6}


def config(folder: Path, name: str, prune: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    train = {"max_steps": 4, "save_every": 2, "validate_every": "never", **changes.pop("train", {})}
    made = tree(folder, name, recipe="kd", train=train, **changes)
    return {**made, "student": {"from_teacher": prune or PRUNE, **changes.get("student", {})}}


def read(folder: Path, file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / file).read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    write_data(folder)
    made = config(folder, "straight")
    made["output"]["report"] = True
    stillhouse.run(made)
    return folder


def test_a_run_keeps_and_shows_what_was_kept(straight: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = straight / "straight"
    found = read(run, "pruning.json")
    assert found["sizes"]["layers"] == [3, len(found["block_influence"])]
    assert len(found["kept"]["layers"]) == 3
    assert len(found["kept"]["intermediate_size"]) == 3
    assert found["rows"] == 6
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert (student.config.num_hidden_layers, student.config.intermediate_size) == (3, 48)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert read(run, "models.json")["student"]["kept"] in page
    assert "by block influence" in page
    assert "chosen on 6 rows of the training data" in page


def test_a_run_is_resumed_on_the_same_parts_of_the_teacher_which_are_not_measured_again(
    straight: Path,
) -> None:
    lora = {"lora": {"rank": 2}}  # of which a checkpoint holds the adapter alone
    whole, killed = (config(straight, name, student=lora) for name in ("lora", "lora-killed"))
    stillhouse.run(whole)
    assert in_child(killed, die=nth(1, "open", "checkpoint-4/trainer_state.json")) == -9
    recorded = straight / "lora-killed" / "pruning.json"
    before = recorded.read_text(encoding="utf-8")
    other = {**killed, "student": {"from_teacher": {**PRUNE, "rows": 1}, **lora}}
    with pytest.raises(ConfigError, match=r"was started with other values.*from_teacher.rows"):
        stillhouse.run(other, resume=True)
    stillhouse.run(killed, resume=True)
    assert recorded.read_text(encoding="utf-8") == before
    assert not differences(outcome(straight / "lora"), outcome(straight / "lora-killed"))


def test_two_processes_keep_the_same_parts_as_one(straight: Path) -> None:
    made = config(straight, "two", train={"max_steps": 2})
    assert in_two(made) == [0, 0]
    alone, two = (read(straight / name, "pruning.json") for name in ("straight", "two"))
    assert two["digest"] == alone["digest"]


def test_check_tells_the_sizes_before_anything_is_measured(straight: Path) -> None:
    made = config(straight, "target", {"parameters": "60K"})
    file = straight / "target.yaml"
    file.write_text(to_yaml(made), encoding="utf-8")
    result = CliRunner().invoke(app, ["check", str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    [line] = [line for line in result.output.splitlines() if "student's sizes" in line]
    run = stillhouse.run(made).folder
    sizes = read(run, "pruning.json")["sizes"]
    assert f"{sizes['layers'][0]} layers" in line
    assert f"MLP {sizes['intermediate_size'][0]}" in line
    assert read(run, "models.json")["student"]["parameters"] <= 60_000


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({}, r"student.from_teacher .*: needs what to keep"),
        ({"layers": 0}, r"student.from_teacher .*: needs at least one layer"),
        ({"parameters": "many"}, r"student.from_teacher.parameters .*: is a number such as 60M"),
        ({"layer": 3}, r"student.from_teacher.layer.*did you mean"),
    ],
)
def test_mistakes_are_told_with_their_field(straight: Path, prune: dict[str, Any], message: str) -> None:
    made = {**config(straight, "wrong"), "student": {"from_teacher": prune}}
    with pytest.raises(ConfigError, match=message):
        resolve(made)


def test_how_to_choose_has_no_effect_where_nothing_is_chosen(straight: Path) -> None:
    made = config(straight, "named", {"layers": [0, 2], "choose": "even", "rows": 7})
    notes = " ".join(resolve(made).notes)
    assert "student.from_teacher.choose=even" in notes
    assert "student.from_teacher.rows=7" in notes


def test_embeddings_are_trimmed_to_the_tokens_of_the_training_data(straight: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = config(straight, "trimmed", {"layers": [0, 3], "vocabulary": "data"})
    made["evaluate"]["teacher"] = True
    run = stillhouse.run(made).folder
    kept, whole = read(run, "pruning.json")["sizes"]["vocabulary"]
    assert kept < whole
    assert f"{kept:,} of {whole:,} tokens" in read(run, "models.json")["student"]["kept"]
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    assert student.get_input_embeddings().weight.shape[0] == len(tokenizer) == kept
    assert student.generation_config.eos_token_id == tokenizer.eos_token_id
    line = json.loads((straight / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert tokenizer.decode(tokenizer(line["prompt"])["input_ids"]) == line["prompt"]
    assert read(run, "evaluation/student-after.json")["metrics"]["kl_to_teacher"] > 0


def test_a_cache_of_all_tokens_and_trimmed_embeddings_are_refused(straight: Path) -> None:
    made = config(straight, "cached", {"layers": [0, 3], "vocabulary": "data"})
    made["teacher"] = {"kind": "cache", "of": made["teacher"], "folder": str(straight / "cache")}
    with pytest.raises(ConfigError, match=r"from_teacher.vocabulary: data: .* still speak of all tokens"):
        stillhouse.run(made)


def test_the_page_shows_a_run_that_resolves_and_the_committed_result(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "ship.md").read_text(encoding="utf-8")
    section = page[page.index("## Pruning") : page.index("## Quantised students")]
    [yaml] = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    (tmp_path / "run.yaml").write_text(yaml, encoding="utf-8")
    prune = resolve(tmp_path / "run.yaml").config.student.from_teacher
    assert prune is not None
    assert (prune.parameters, prune.vocabulary) == (700_000, "data")
    result = json.loads((ROOT / "benchmarks" / "results" / "pruning.json").read_text(encoding="utf-8"))
    assert script(ROOT / "benchmarks" / "pruning.py").table(result) in section
    fields = set(re.findall(r"^\| `(\w+)", section, flags=re.MULTILINE))
    assert fields == set(type(prune).model_fields)
