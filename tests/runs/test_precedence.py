"""The user beats the recipe; a change of kind keeps what still fits, or says what it drops."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.runs.resolve import Resolved, resolve

TREE: dict[str, Any] = {
    "student": {"path": "student"},
    "teacher": {"kind": "live", "path": "teacher"},
    "data": {"train": "train.jsonl", "valid": "valid.jsonl"},
}


def resolved(recipe: str, *overrides: str, **changes: Any) -> Resolved:
    return resolve({**TREE, "recipe": recipe, **changes}, list(overrides))


@pytest.mark.parametrize("override", ["engine.kind=vllm", "engine=vllm"])
def test_another_engine_samples_as_the_recipe_says(override: str) -> None:
    found = resolved("distillm2", override)
    sampling = found.config.engine.sampling
    assert (found.config.engine.kind, sampling.temperature, sampling.top_p) == ("vllm", 0.8, 0.95)
    assert found.provenance["engine.sampling.top_p"]["origin"] == "recipe distillm2"
    assert found.notes == ()


def test_a_file_that_names_another_kind_keeps_what_the_recipe_said() -> None:
    found = resolved("distillm2", engine={"kind": "vllm", "sampling": {"temperature": 0.5}})
    assert (found.config.engine.sampling.temperature, found.config.engine.sampling.top_p) == (0.5, 0.95)


def test_what_the_new_kind_does_not_have_is_dropped_and_told() -> None:
    found = resolved("gkd", "responses.kind=on_policy")
    assert found.config.responses.sampling.temperature == 1.0
    (note,) = found.notes
    assert note.startswith("responses.student_share=0.5 (recipe gkd) is dropped")
    assert "command line says on_policy" in note
    found = resolved("skl", "objective.kind=alpha_mixture")
    assert found.config.objective.alpha == -1.0, "an alpha of another range is another alpha"
    assert "objective.alpha=0.1" in found.notes[0]
    assert resolved("skl", "objective.kind=skew_rkl", "objective.alpha=0.3").config.objective.alpha == 0.3


def test_options_of_the_file_stay_under_a_kind_of_the_command_line() -> None:
    found = resolved("gkd", "engine.kind=vllm", engine={"batch_size": 4, "sampling": {"top_p": 0.9}})
    assert found.config.engine.sampling.top_p == 0.9
    assert any(note.startswith("engine.batch_size=4 (dictionary) is dropped") for note in found.notes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.kind=skew_kl", "objective.alpha=0.2"],
        ["objective.alpha=0.2", "objective.kind=skew_kl"],
    ],
)
def test_a_kind_and_its_options_come_in_any_order(overrides: list[str]) -> None:
    assert resolved("gkd", *overrides).config.objective.alpha == 0.2
    keywords = dict(text.split("=") for text in overrides) | {"objective.alpha": 0.2}
    assert resolve({**TREE, "recipe": "gkd"}, keywords).config.objective.alpha == 0.2


@pytest.mark.parametrize("recipe", ["gkd", "imitkd", "csd_on_policy", "gold", "skd", "distillm", "seqkd"])
def test_the_sampling_of_the_user_beats_that_of_the_recipe(recipe: str) -> None:
    found = resolved(recipe, "engine.sampling.min_tokens=3", engine={"sampling": {"temperature": 0.9}})
    sampling = found.config.responses.sampling
    assert (sampling.temperature, sampling.min_tokens) == (0.9, 3)
    assert found.provenance["responses.sampling.min_tokens"]["origin"] == "command line"
    nearer = resolved(recipe, "engine.sampling.temperature=0.9", "responses.sampling.temperature=0.6")
    assert nearer.config.responses.sampling.temperature == 0.6


def test_without_a_word_of_the_user_the_recipe_holds() -> None:
    assert resolved("skd", "engine.batch_size=8").config.responses.sampling.temperature == 0.5
