"""Combinations that would train something else than they say are refused before anything loads."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.errors import ConfigError
from stillhouse.runs.resolve import resolve

TREE: dict[str, Any] = {
    "student": {"path": "student"},
    "teacher": {"kind": "live", "path": "teacher"},
    "data": {"train": "train.jsonl", "valid": "valid.jsonl"},
}


def refusal(*overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve({**TREE, **changes}, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("sampling", ["temperature: 0.7", "top_p: 0.5", "temperature: 0.0", "min_tokens: 4"])
def test_policy_gradients_of_text_from_another_distribution(sampling: str) -> None:
    message = refusal(f"responses.sampling={{{sampling}}}", recipe="minillm")
    assert "biased" in message
    assert sampling.partition(":")[0] in message
    assert "biased" in refusal(f"engine.sampling={{{sampling}}}", recipe="minillm")


def test_a_sum_around_what_takes_a_mean_for_each_source() -> None:
    terms = [{"kind": "contrastive"}, {"kind": "cross_entropy"}]
    message = refusal(objective={"kind": "sum", "terms": terms}, responses={"kind": "pairs"})
    assert "objective.terms[0]" in message
    assert "mean for each source" in message


def test_plain_text_that_would_be_compared_with_the_teacher() -> None:
    data = {"train": "train.jsonl", "text": "text.txt"}
    message = refusal(recipe="skl", data=data)
    assert "data.text" in message
    assert "text: {kind: cross_entropy}" in message
    objective = {"fixed": {"kind": "skew_kl"}, "text": {"kind": "cross_entropy"}}
    assert resolve({**TREE, "recipe": "skl", "data": data, "objective": objective}).config.data.text


def test_a_student_that_is_its_own_teacher_is_told() -> None:
    (note,) = resolve({**TREE, "recipe": "kd", "student": {"path": "./teacher"}}).notes
    assert "student and teacher are the same model" in note
    assert resolve({**TREE, "recipe": "kd"}).notes == ()
    itself = {
        "student": {"path": "./student"},
        "teachers": {"reference": {"kind": "live", "path": "student"}},
    }
    assert resolve({**TREE, **itself, "objective": "advantage"}).notes == (), "as ADPA's reference it may be"


def test_messages_lead_somewhere() -> None:
    assert "A space is missing after the colon: rank: 8" in refusal("student.lora={rank:8}", recipe="kd")
    message = refusal("objective.alpha=0.2", recipe="kd")
    assert "these have it: skew_kl" in message
    assert "lora" not in message
    assert "recipe" in refusal()
    assert "rouge_l is not measured" in refusal("train.keep=best", "train.validate_rouge=false", recipe="kd")
