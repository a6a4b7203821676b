"""A student as a draft model: what leaves is what assisted generation takes, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stillhouse
from stillhouse.errors import ConfigError
from stillhouse.models import TeacherModel, load_teacher
from stillhouse.report import load_run
from stillhouse.report.results import task_results
from stillhouse.report.systems import gather
from stillhouse.runs.resolve import resolve
from tests.small_runs import TEACHER, tree, write_data

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 256}  # fmt: skip
ROWS = 1100


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's teacher with padding rows behind its tokens, as large models have, and without a
    cache, as trainers leave models."""
    folder = tmp_path_factory.mktemp("target")
    model: Any = load_teacher(TeacherModel(path=TEACHER, dtype="float32"))
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    model.generation_config.use_cache = False
    model.save_pretrained(folder)
    source = Path(stillhouse.__file__).parent / "demo" / "teacher"
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def config(folder: Path, target: Path, **changes: Any) -> dict[str, Any]:
    made = tree(folder, "draft", recipe="distillspec", train={"max_steps": 2, "validate_every": "never"})
    judged = {"kind": "speculative", "limit": 2, "gammas": [1, 2], "gamma": 2, "sampling": {"max_tokens": 8}}
    sets = [{**judged, "name": name, "data": str(folder / f"{name}.jsonl")} for name in ("train", "valid")]
    made["student"] = {"tokenizer": TEACHER, "from_config": LLAMA}
    made["teacher"] = {"kind": "live", "path": str(target)}
    made["evaluate"] |= {"before": True, "tasks": sets}
    made["output"]["draft"] = True
    return made | changes


@pytest.fixture(scope="module")
def run(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    write_data(folder, rows=6, valid=2)
    return stillhouse.run(config(folder, target)).folder


def test_assisted_generation_takes_it_with_the_targets_text(run: Path, target: Path) -> None:
    draft = AutoModelForCausalLM.from_pretrained(run / "student").eval()
    large = AutoModelForCausalLM.from_pretrained(target).eval()
    assert draft.config.vocab_size == large.config.vocab_size == ROWS
    assert draft.get_output_embeddings().weight.shape[0] == ROWS
    assert not draft.get_output_embeddings().weight[1024:].any()
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(target).get_vocab()
    ids = tokenizer("name[The Phoenix], eatType[pub]\n", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 12, "use_cache": True}
    options["pad_token_id"] = tokenizer.pad_token_id
    alone = large.generate(**ids, **options)
    assert torch.equal(large.generate(**ids, **options, assistant_model=draft), alone)


def test_it_is_judged_before_and_after_on_each_task_by_name(run: Path) -> None:
    for system in ("student-before", "student-after"):
        for task in ("train", "valid"):
            found = json.loads((run / "evaluation" / f"{system}.{task}.json").read_text())["metrics"]
            assert [point["gamma"] for point in found["by_gamma"]] == [1, 2]
            assert 1 <= found["block_efficiency"] <= 3
            assert found["speed_up"] > 0


def test_a_draft_that_slows_its_target_down_is_told_in_words(run: Path) -> None:
    path = run / "evaluation" / "student-after.valid.json"
    whole = json.loads(path.read_text())
    for ratio, said in ((0.5, True), (1.5, False)):
        whole["metrics"]["speed_up"] = ratio
        path.write_text(json.dumps(whole))
        [valid] = [one for one in task_results(gather([load_run(run)])) if one.task == "valid"]
        assert (
            any(f"makes the teacher slower: {ratio:.2f} times" in told for told in valid.slow_drafts) == said
        )
        assert all(told in str(valid.table.note) for told in valid.slow_drafts)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adapters apart": (
        {"student": {"path": TEACHER, "lora": {"merge": False}}},
        r"output.draft .*: a draft model is one whole model",
    ),
    "fewer tokens": (
        {"student": {"from_teacher": {"layers": [0], "vocabulary": "data"}}},
        r"output.draft .*: a draft model needs all tokens of its target",
    ),
    "no target": ({"teacher": None, "recipe": "sft"}, r"output.draft"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_draft_of_it(case: str, tmp_path: Path, target: Path) -> None:
    changes, message = REFUSED[case]
    write_data(tmp_path, rows=4, valid=2)
    made = config(tmp_path, target, **changes)
    if case == "no target":
        made["evaluate"]["tasks"] = []
    with pytest.raises(ConfigError, match=message):
        resolve(made)
