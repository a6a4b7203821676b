"""Every fault at once, in words of the file; and a valid tree knows where each value came from."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from trees_for_tests import Round, Square, Tree

from stillhouse.config import (
    Layer,
    Layered,
    StrictConfig,
    commented_yaml,
    flatten,
    strict_yaml,
    to_yaml,
    validate,
)
from stillhouse.errors import ConfigError, Fault


def refused(text: str, *overrides: str) -> dict[str, Fault]:
    layer = Layer(*strict_yaml.parse(text, "run.yaml"))
    with pytest.raises(ConfigError) as caught:
        validate(Tree, Layered.merged(layer, *map(Layer.override, overrides)))
    assert pickle.loads(pickle.dumps(caught.value)).faults == caught.value.faults
    faults = {fault.path: fault for fault in caught.value.faults if isinstance(fault, Fault)}
    assert len(faults) == len(caught.value.faults)
    return faults


def test_all_faults_are_told_at_once_with_path_and_line() -> None:
    faults = refused(
        """shape: {kind: ruond}
shapes:
- {kind: round, radius: 2}
- {kind: square, sied: 1}
- 3
speed: {rate: "1e-5", mode: fsat, steps: 0}
folder: 3
rate: 1
other: {kind: square, side: {kind: linear, start: 1, ennd: 2}}
""",
        "sppeed.rate=1",
        "shapes2=1",
    )
    assert set(faults) == {
        "name", "shape.kind", "shapes[0].radius", "shapes[1].sied", "shapes[2]", "speed.rate", "speed.mode",
        "speed.steps", "folder", "rate", "other.side.end", "other.side.ennd", "sppeed", "shapes2",
    }  # fmt: skip
    assert "is missing" in faults["name"].problem
    assert faults["name"].hint == "What it is called."
    assert "did you mean 'round'" in faults["shape.kind"].problem
    assert faults["shape.kind"].origin == "run.yaml:1"
    assert "between 0 and 1, got 2" in faults["shapes[0].radius"].problem
    assert faults["shapes[0].radius"].origin == "run.yaml:3"
    assert "did you mean 'side'" in faults["shapes[1].sied"].problem
    assert faults["shapes[1].sied"].allowed == "side, corners"
    assert faults["speed.rate"].hint == "Write it without quotes."
    assert faults["speed.mode"].allowed == "'slow' or 'fast'"
    assert "did you mean 'fast'" in faults["speed.mode"].problem
    assert faults["speed.steps"].problem == "must be at least 1"
    assert faults["speed.steps"].got == "0"
    assert faults["rate"].hint == "Did you mean speed.rate or top_speed.rate?"
    assert "did you mean 'end'" in faults["other.side.ennd"].problem
    assert faults["sppeed"].origin == "command line"
    assert "did you mean 'speed'" in faults["sppeed"].problem


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("name: 3", "name", "got 3; allowed: text"),
        ("name: x\nspeed: 3", "speed", "got 3; allowed: a mapping"),
        ("name: x\nspeed:", "speed", "got null; allowed: a mapping. Remove the line"),
        ("name: x\nspeed: {rate: true}", "speed.rate", "got true; allowed: a number"),
        ("name: x\nspeed: {rate: .inf}", "speed.rate", "finite"),
        ("name: x\nspeed: {rate: 0}", "speed.rate", "must be greater than 0.0; got 0"),
        ("name: x\nspeed: {steps: 1.5}", "speed.steps", "got 1.5; allowed: a whole number"),
        ("name: x\nshape: {radius: 1}", "shape", "has no kind; allowed: round, square"),
        ("name: x\nshape: 3", "shape", "should be a mapping with a kind"),
        ("name: x\nshape: {kind: round, radius: yes}", "shape.radius", "should be a number, or a schedule"),
        ("name: x\nlabels: {a: 1}", "labels.a", "allowed: text"),
        ("name: misfit", "speed.mode", "does not go with that name; got slow"),
    ],
)
def test_one_fault_reads_well(text: str, path: str, words: str) -> None:
    faults = refused(text)
    assert list(faults) == [path]
    assert words in str(faults[path])
    assert "pydantic" not in str(faults[path])
    assert not re.search(r"\b(BaseModel|function-|union|Literal)", str(faults[path]))


def test_origin_of_every_value() -> None:
    layered = Layered.merged(
        Layer.of(
            {"name": "x", "shape": {"kind": "square", "side": 2.0}, "speed": {"rate": 1.0}}, "recipe kd"
        ),
        Layer(*strict_yaml.parse("speed:\n  mode: fast\nother: round\n", "run.yaml")),
        Layer.override("speed.rate=0.5"),
    )
    tree, origins = validate(Tree, layered)
    flat = flatten(tree)
    assert set(flat) == set(origins)
    assert flat["speed.rate"] == 0.5
    assert flat["shape.corners"] == [1, 2]
    expected = {
        "name": "recipe kd",
        "shape.side": "recipe kd",
        "shape.corners": "default",
        "speed.mode": "run.yaml:2",
        "speed.rate": "command line",
        "speed.steps": "default",
        "other.kind": "run.yaml:3",
        "other.radius": "default",
        "folder": "default",
    }
    assert {path: origins[path] for path in expected} == expected


schedules = st.builds(
    lambda start, end: {"kind": "linear", "start": start, "end": end}, st.floats(0, 1), st.floats(0, 1)
)
texts = st.text(max_size=12) | st.sampled_from(
    ["yes", "1e-5", "null", "~", "010", "1:30", "a: b", "#x", "- a", "{", "=", "<<"]
)
shapes = st.one_of(
    st.fixed_dictionaries({"kind": st.just("round")}, optional={"radius": st.floats(0, 1) | schedules}),
    st.fixed_dictionaries(
        {"kind": st.just("square")},
        optional={"side": st.floats(0, 1e9), "corners": st.lists(st.integers(), max_size=3)},
    ),
    st.sampled_from(["round", "square"]),
)
trees = st.fixed_dictionaries(
    {"name": texts.filter(lambda text: text != "misfit")},
    optional={
        "shape": shapes,
        "shapes": st.lists(shapes, max_size=3),
        "other": st.none() | shapes,
        "speed": st.fixed_dictionaries(
            {}, optional={"rate": st.floats(1e-300, 1e300), "mode": st.sampled_from(["slow", "fast"])}
        ),
        "folder": st.none() | st.just("a/b"),
        "labels": st.dictionaries(texts, texts, max_size=3),
    },
)


def loaded(text: str) -> Tree:
    return validate(Tree, Layered.merged(Layer(*strict_yaml.parse(text, "again.yaml"))))[0]


@settings(max_examples=150, deadline=None)
@given(trees)
def test_what_is_written_reads_back_equal(values: dict[str, Any]) -> None:
    tree, origins = validate(Tree, Layered.merged(Layer.of(values, "test")))
    assert set(origins) == set(flatten(tree))
    assert loaded(to_yaml(tree)) == tree
    form = commented_yaml(Tree, values)
    assert strict_yaml.parse(form, "form.yaml")[0] == values


@settings(max_examples=50, deadline=None)
@given(trees)
def test_options_of_the_form_are_the_defaults_when_uncommented(values: dict[str, Any]) -> None:
    text = re.sub(
        r"^(\s*)#(?! )", r"\1", commented_yaml(Tree, {**values, "name": "x", "labels": {}}), flags=re.M
    )
    assert (
        loaded(text)
        == validate(Tree, Layered.merged(Layer.of({**values, "name": "x", "labels": {}}, "test")))[0]
    )


def test_the_form_explains_each_option() -> None:
    form = commented_yaml(Tree, {"name": "x", "shape": {"kind": "square"}})
    assert "# What it is called.\nname: x" in form
    assert "#side: 1.0" in form
    assert "# How it moves.\n#speed:\n  # How fast" in form
    assert "  #rate: 0.0001" in form
    assert "  #rate: 7.0" in form
    assert yaml.safe_load(form) == {"name": "x", "shape": {"kind": "square"}}


def test_a_part_given_as_it_is_stays(tmp_path: Path) -> None:
    layered = Layered.merged(
        Layer.of({"name": "x", "shape": Square(side=3.0), "folder": tmp_path}, "keyword")
    )
    tree, origins = validate(Tree, layered)
    assert tree.shape == Square(side=3.0)
    assert origins["shape.side"] == "keyword"
    assert origins["shape.corners"] == "default"
    assert flatten(tree)["folder"] == str(tmp_path)
    assert isinstance(tree, StrictConfig)
    assert validate(Tree, Layered.merged(Layer.of({"name": "y"}, "keyword")))[0].shape == Round()
