"""The task on preference pairs: by hand, against a reference, and with rows that are no pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.evaluate.contexts import context, models

from stillhouse.evaluate.tasks import REGISTRY
from stillhouse.files import write_jsonl
from stillhouse.report.scores import prompt_sums

PAIRS = [
    {
        "prompt": "name[The Mill], food[Indian]",
        "chosen": "The Mill serves Indian food.",
        "rejected": "Mill mill x",
    },
    {
        "prompt": "name[Aromi], area[riverside]",
        "chosen": "zq zq zq zq zq",
        "rejected": "Aromi is by the river.",
    },
    {"prompt": "name[Wildwood]", "response": "Wildwood is a pub."},
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    return str(tmp_path / "pairs.jsonl")


def logprob(model: torch.nn.Module, prompt: str, answer: str) -> float:
    tokenizer = models()[0]
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = [*tokenizer(prompt + answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(scores[place - 1, ids[place]].item() for place in range(len(before), len(ids))) / (
        len(ids) - len(before)
    )


def test_accuracy_and_margin_are_those_of_the_likelihoods(file: str) -> None:
    task = REGISTRY.parse({"kind": "preference", "data": file})
    result = task.evaluate(context("teacher"))
    teacher = models()[1]
    margins = [
        logprob(teacher, f"{row['prompt']}\n", row["chosen"])
        - logprob(teacher, f"{row['prompt']}\n", row["rejected"])
        for row in PAIRS[:2]
    ]
    assert margins[0] > 0 > margins[1]
    assert result.metrics["preference_accuracy"] == 0.5
    assert [row["preference_accuracy"] for row in result.rows] == [1.0, 0.0]
    assert [row["preference_margin"] for row in result.rows] == pytest.approx(margins, rel=1e-3)
    assert result.settings["dropped"] == {"no preference pair": 1}
    assert "reward_accuracy" not in result.metrics
    sums = prompt_sums(result.metrics, result.rows)
    assert {"preference_accuracy", "preference_margin", "mean_length"} <= sums.keys()


def test_a_reference_shows_how_far_the_model_has_moved(file: str, tmp_path: Path) -> None:
    models()[2].save_pretrained(tmp_path / "start")
    task, other = (
        REGISTRY.parse({"kind": "preference", "data": file, "reference": reference})
        for reference in (str(tmp_path / "start"), "package:stillhouse/demo/teacher")
    )
    still = task.evaluate(context()).metrics
    assert still["kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert still["reward_accuracy"] == 0.5
    assert still["reward_margin"] == 0.0
    moved = other.evaluate(context())
    assert moved.metrics["kl_to_reference"] > 0.1
    assert moved.metrics["kl_to_reference_on_pairs"] > 0.1
    assert {"kl_to_reference", "reward_margin"} <= prompt_sums(moved.metrics, moved.rows).keys()
    alone = REGISTRY.parse({"kind": "preference", "data": file})
    assert alone.dependencies(context())["reference"] is None
    assert task.dependencies(context())["reference"] != other.dependencies(context())["reference"]


def test_a_reference_that_another_run_has_replaced_is_loaded_anew(file: str, tmp_path: Path) -> None:
    models()[2].save_pretrained(tmp_path / "start")
    task = REGISTRY.parse({"kind": "preference", "data": file, "reference": str(tmp_path / "start")})
    before = task.dependencies(context())
    models()[1].save_pretrained(tmp_path / "start")
    assert task.dependencies(context())["reference"] != before["reference"]
    assert task.evaluate(context()).metrics["kl_to_reference"] > 0.1
