"""Layers of a run: recipe, file, overrides; short forms that take options from above."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from stillhouse import recipes
from stillhouse.errors import ConfigError
from stillhouse.runs.resolve import resolve

TREE: dict[str, Any] = {
    "student": {"path": "student"},
    "teacher": {"kind": "live", "path": "teacher"},
    "data": {"train": "train.jsonl"},
    "objective": "skew_kl",
}


def origin(resolved: Any, path: str) -> str:
    return str(resolved.provenance[path]["origin"])


def test_an_option_extends_a_bare_path_and_a_bare_kind() -> None:
    found = resolve(TREE, ["data.train.labelled=200", "objective.alpha=0.3"])
    assert found.config.data.train.path == "train.jsonl"
    assert found.config.data.train.labelled == 200
    assert found.config.objective.kind == "skew_kl"
    assert found.config.objective.alpha == 0.3
    assert origin(found, "data.train.labelled") == "command line"
    assert origin(found, "data.train.path") == "dictionary"
    assert origin(found, "objective.kind") == "dictionary"


def test_a_list_of_datasets_is_a_mixture_whose_values_have_their_origins() -> None:
    sources = ["a.jsonl", {"path": "b.csv", "weight": 2}]
    found = resolve({**TREE, "data": {"train": sources}}, ["data.bad_rows=drop"])
    assert [(one.title, one.weight) for one in found.config.data.train.parts()] == [
        ("a.jsonl", 1),
        ("b.csv", 2),
    ]
    assert origin(found, "data.train.sources[0].path") == "dictionary"
    assert origin(found, "data.train.sources[1].weight") == "dictionary"
    assert origin(found, "data.train.sources[1].limit") == "default"
    assert origin(found, "data.train.each_output") == "default"


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"kind": "cache", "of": "teacher", "store": "topk", "k": 8}},
        {"data": {"train": ["a.jsonl", {"path": "b.csv", "weight": 2}]}},
    ],
)
def test_a_file_with_all_values_in_it_is_the_same_run(change: dict[str, Any]) -> None:
    found = resolve({**TREE, **change})
    again = resolve(yaml.safe_load(found.yaml))
    assert again.yaml == found.yaml
    assert again.config == found.config


def test_a_file_extends_the_recipes_short_form_and_is_extended_itself() -> None:
    tree = {**TREE, "recipe": "csd_pairs", "evaluate": {"data": "eval.jsonl"}}
    del tree["objective"]
    found = resolve(tree, {"evaluate.data.limit": 3, "objective": {"student": {"w1": "teacher"}}})
    assert found.config.evaluate.data.path == "eval.jsonl"
    assert found.config.evaluate.data.limit == 3
    assert found.config.objective.mapped()["student"].w1 == "teacher"
    assert found.config.objective.mapped()["teacher"].w1 == "student"


def test_a_map_of_objectives_takes_the_place_of_a_single_one_and_the_other_way() -> None:
    mapped = {"objective": {"fixed": {"kind": "forward_kl"}}}
    found = resolve({**TREE, "recipe": "kd", **mapped})
    assert list(found.config.objective.mapped()) == ["fixed"]
    tree = {**TREE, "recipe": "csd_pairs", "objective": {"kind": "jsd"}}
    assert resolve(tree).config.objective.kind == "jsd"


def test_the_callers_dictionary_is_not_changed() -> None:
    tree = {**TREE, "data": {"train": "train.jsonl"}}
    resolve(tree, ["data.train.limit=1"])
    assert tree["data"] == {"train": "train.jsonl"}


def test_a_source_that_the_file_sets_is_replaced_as_a_whole() -> None:
    tree = {**TREE, "data": {"train": {"path": "train.jsonl", "limit": 4}}}
    found = resolve(tree, ["data.train=other.parquet"])
    assert found.config.data.train.kind == "parquet"
    assert found.config.data.train.limit is None


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes.all_recipes()])
def test_the_resolved_file_of_every_recipe_says_all_and_gives_the_same_run(name: str) -> None:
    tree = {**TREE, "recipe": name, "data": {"train": "train.jsonl", "valid": "valid.jsonl"}}
    del tree["objective"]
    tree["teachers"] = {one: TREE["teacher"] for one in recipes.find(name).teachers if one != "main"}
    found = resolve(tree)
    again = resolve(yaml.safe_load(found.yaml))
    assert again.config == found.config


def test_a_context_alone_is_that_of_the_main_teacher_in_every_layer() -> None:
    tree = {
        **TREE,
        "recipe": "self_distillation",
        "data": {"train": "t.jsonl", "teacher_context": "{prompt}!"},
    }
    del tree["objective"]
    assert resolve(tree).config.data.teacher_context == {"main": "{prompt}!"}
    found = resolve(tree, ["data.teacher_context.main='{prompt}?'"])
    assert found.config.data.teacher_context == {"main": "{prompt}?"}


def test_the_length_of_answers_is_written_out() -> None:
    tree = {**TREE, "recipe": "gkd", "data": {"train": "train.jsonl", "max_response": 40}}
    found = resolve(tree)
    assert found.config.evaluate.sampling.max_tokens == 40
    assert found.config.responses.sampling.max_tokens == 40
    assert origin(found, "evaluate.sampling.max_tokens") == "data.max_response"
    again = resolve(yaml.safe_load(found.yaml)).config
    assert again.evaluate.sampling.max_tokens == 40
    found = resolve(tree, ["engine.sampling.max_tokens=7"])
    assert found.config.responses.sampling.max_tokens == 7
    assert origin(found, "responses.sampling.max_tokens") == "engine.sampling.max_tokens"
    assert found.config.evaluate.sampling.max_tokens == 40


def test_keywords_may_be_dotted_or_nested() -> None:
    dotted = resolve(TREE, {"train.lr": 0.5, "train": {"epochs": 2.0}})
    assert (dotted.config.train.lr, dotted.config.train.epochs) == (0.5, 2.0)
    assert origin(dotted, "train.lr") == "keyword"


def test_a_keyword_of_no_known_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lr .*unknown key.*train\.lr"):
        resolve(TREE, {"lr": 0.5})
