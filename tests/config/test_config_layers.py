"""Later layers win, options of another kind never stay behind, and every value keeps its origin."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.config import Layer, Layered
from stillhouse.errors import ConfigError

names = st.sampled_from(["a", "b", "kind", "c"])
scalars = st.integers(0, 3) | st.none() | st.text("xy", max_size=2)
mappings = st.recursive(
    st.dictionaries(names, scalars, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from(["a", "b", "c"]), inner | scalars, max_size=3),
    max_leaves=8,
)


def merged(*values: dict[str, Any]) -> Layered:
    return Layered.merged(*(Layer.of(value, f"layer {index}") for index, value in enumerate(values)))


def paths(value: Any, path: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    found = {path} if path else set()
    for key, item in value.items() if isinstance(value, dict) else ():
        found |= paths(item, (*path, key))
    return found


@given(mappings, mappings)
def test_the_upper_layer_is_in_the_result_and_origins_fit_the_values(
    low: dict[str, Any], high: dict[str, Any]
) -> None:
    layered = merged(low, high)
    assert {path for path in layered.origins if path} == paths(layered.values)

    def contained(part: Any, whole: Any) -> bool:
        if not isinstance(part, dict):
            return bool(part == whole)
        return all(key in whole and contained(value, whole[key]) for key, value in part.items())

    assert contained(high, layered.values)
    assert all(layered.origins[path] == "layer 1" for path in paths(high))
    assert merged(layered.values, high).values == layered.values


def test_another_kind_replaces_as_a_whole() -> None:
    low = {"objective": {"kind": "skew_kl", "alpha": 0.1, "deep": {"x": 1}}}
    assert merged(low, {"objective": {"kind": "csd"}}).values == {"objective": {"kind": "csd"}}
    assert merged(low, {"objective": {"kind": "csd"}}).origins[("objective", "kind")] == "layer 1"
    kept = merged(low, {"objective": {"kind": "skew_kl", "alpha": 0.3}})
    assert kept.values["objective"] == {"kind": "skew_kl", "alpha": 0.3, "deep": {"x": 1}}
    assert merged(low, {"objective": {"alpha": 0.2}}).values["objective"]["kind"] == "skew_kl"
    mapped = {"objective": {"teacher": {"kind": "skew_kl"}}}
    assert merged(mapped, {"objective": {"kind": "csd"}}).values == {"objective": {"kind": "csd"}}


def test_overrides_are_yaml_and_may_be_empty() -> None:
    layered = Layered.merged(
        Layer.of({"train": {"lr": 1.0, "epochs": 3}, "teacher": {"path": "x"}}, "run.yaml"),
        Layer.override("train.lr=1e-4"),
        Layer.override("teacher="),
        Layer.override("data.train={path: a=b.jsonl, labelled: 200}"),
        Layer.override("names=[a, b]"),
    )
    assert layered.values["train"] == {"lr": 1e-4, "epochs": 3}
    assert layered.values["teacher"] is None
    assert layered.values["data"] == {"train": {"path": "a=b.jsonl", "labelled": 200}}
    assert layered.values["names"] == ["a", "b"]
    assert layered.origin(("train", "lr")) == "command line"
    assert layered.origin(("train", "epochs")) == "run.yaml"
    assert layered.origin(("train", "missing")) == "run.yaml"


@pytest.mark.parametrize("text", ["train.lr", "=3", "a..b=1", ".a=1", "a.=1"])
def test_an_override_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"name\.name=value"):
        Layer.override(text)


def test_a_broken_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'a\.b=\{x: ': the value is not YAML"):
        Layer.override("a.b={x: ")


def test_keywords_may_be_dotted_and_nobodys_dictionary_changes() -> None:
    mine = {"lr": 1.0}
    layer = Layer.keywords({"train": mine, "train.epochs": 2})
    assert layer.values == {"train": {"lr": 1.0, "epochs": 2}}
    assert mine == {"lr": 1.0}
    assert layer.origins[("train", "epochs")] == "keyword"
