"""Two steps aside: what is predicted of them, and what they take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

import pytest
import yaml
from transformers import AutoConfig

from stillhouse.engines.base import Engine, Sampling
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.runs.measure import PROBE, StepCost, aside, predict, with_layers
from stillhouse.runs.measured_steps import measured
from stillhouse.runs.model_sizes import without_weights
from stillhouse.runs.resolve import resolve
from stillhouse.runs.run_watch import StepWatch, WritingWatch
from stillhouse.runs.teacher_cache import fill_cache
from stillhouse.train.step import Step
from tests.workshop import Workshop


def test_check_predicts_two_steps_and_measures_them(workshop: Workshop) -> None:
    before = sorted(path.name for path in workshop.folder.iterdir())
    said = workshop.stillhouse("check", "run.yaml", "--no-values", "--measure").out
    found = re.search(r"^ *time +(\S+ s|\S+ min \S+ s)( to \S+.*)? *$", said, flags=re.MULTILINE)
    assert found is not None, said
    for name in ("peak memory (GB)", "seconds a step", "seconds of the processor", "student forward"):
        numbers = re.search(rf"{re.escape(name)} +(\S+) +(\S+) +(\S+)", said)
        assert numbers is not None, said
        predicted, taken, ratio = map(float, numbers.groups())
        assert ratio == pytest.approx(predicted / taken, rel=0.05)
        assert name != "peak memory (GB)" or 0.5 < ratio < 2
    for name in ("starting", "loading", "training", "validation", "checkpoints", "export", "evaluation"):
        assert re.search(rf"^ *{name} +\d", said, flags=re.MULTILINE), said
    assert sorted(path.name for path in workshop.folder.iterdir()) == before


def test_measuring_leaves_every_file_as_it_was(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("aside")
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text(encoding="utf-8"))
    tree |= {"recipe": "distillm", "teacher": {"kind": "cache", "of": "teacher"}}
    tree["data"]["train"] = ["train.jsonl", {"path": "valid.jsonl", "limit": 1}]
    (workshop.folder / "cached.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert workshop.stillhouse("run", "cached.yaml", "train.max_steps=1").code == 0
    before = _files(workshop.folder)
    file, changes = aside(resolve("cached.yaml").config, place)
    assert measured(str(file), changes)["seconds"] > 0
    assert _files(workshop.folder) == before
    assert sorted(path.name for path in place.iterdir()) == ["cache-0", "run", "run.yaml"]


@pytest.mark.parametrize("recipe", ["distillm", "distillm2"])
def test_two_steps_of_a_method_that_counts_on_more(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory, recipe: str
) -> None:
    place = tmp_path_factory.mktemp("aside")
    resolved = resolve("run.yaml", {"recipe": recipe, "train.epochs": 3.0})
    file, changes = aside(resolved.config, place)
    found = measured(str(file), {**changes, **PROBE})
    assert found["seconds"] > 0
    assert found["run"]["validation"] > 0


def test_measuring_finds_what_a_cache_has(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("aside")
    cached = {"kind": "cache", "of": "teacher"}
    fill_cache(resolve("run.yaml", {"teacher": cached}).config)
    before = _files(workshop.folder)
    file, changes = aside(resolve("run.yaml", {"teacher": {**cached, "on_miss": "error"}}).config, place)
    assert measured(str(file), changes)["seconds"] > 0
    assert _files(workshop.folder) == before


def _files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was changed, and what is in it."""
    return {
        str(path): (path.lstat().st_mtime_ns, b"" if path.is_dir() else path.read_bytes())
        for path in folder.rglob("*")
    }


def test_a_run_is_watched_and_the_step_is_itself_again(workshop: Workshop, tmp_path: Path) -> None:
    methods = Step.prepare, Step.loss, Step.finish
    file = str(workshop.folder / "run.yaml")
    found = measured(file, {"train.max_steps": 2, "output.folder": str(tmp_path / "run")})
    log = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    row = [one for one in map(json.loads, log) if one["phase"] == "train"][-1]
    assert found["phases"]["student"] == row["seconds/student"]
    assert found["of_tokens"]["student"] == row["tokens/student"]
    assert 2 * row["tokens/student"] / row["sequences"] <= found["tokens"] <= 2 * 104, "two rows, padded"
    assert found["processor"] > 0
    assert (Step.prepare, Step.loss, Step.finish) == methods
    with pytest.raises(ZeroDivisionError), StepWatch().on(Step):
        raise ZeroDivisionError
    assert (Step.prepare, Step.loss, Step.finish) == methods


def test_a_model_that_is_asked_for_nothing_has_not_written() -> None:
    watch, unused = WritingWatch(), cast(Engine, None)
    with watch.on(ResponseGenerator):
        assert ResponseGenerator(unused, "student", Sampling(), lambda: 0).generate([], seed=1) == []
    assert watch.by_source == {}, "seconds a response would divide by none"


def test_a_cost_in_proportion_to_tokens() -> None:
    phases = {"generate": 4.0, "student": 2.0, "backward": 3.0, "optimiser": 1.0}
    cost = StepCost(11.0, 20.0, phases, {"student": 100.0, "generate": 50.0})
    half = cost.for_tokens({"student": 50.0, "generate": 10.0})
    assert half.phases == pytest.approx({"generate": 0.8, "student": 1.0, "backward": 1.5, "optimiser": 1.0})
    assert half.seconds == pytest.approx(11.0 - 10.0 + 4.3)
    assert half.processor == pytest.approx(20.0 * 0.43)
    assert cost.for_tokens(cost.tokens) == cost


def test_a_config_with_fewer_layers_makes_a_model() -> None:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, vocab_size=64, layer_types=["full_attention"] * 4,
    )  # fmt: skip
    smaller = with_layers(config, 2)
    assert smaller.layer_types == ["full_attention"] * 2
    assert (smaller.num_hidden_layers, config.num_hidden_layers) == (2, 4)
    gpt2 = with_layers(AutoConfig.for_model("gpt2", n_layer=5), 1)
    assert gpt2.n_layer == 1, "by the name that its class has"


def test_models_that_cannot_be_probed_are_told(workshop: Workshop) -> None:
    tree = yaml.safe_load((workshop.folder / "run.yaml").read_text(encoding="utf-8"))
    cached = {"kind": "cache", "of": "teacher"}
    fill_cache(resolve({**tree, "teacher": cached}).config)
    assert predict(resolve({**tree, "teacher": {**cached, "on_miss": "error"}}).config) is None
    model = resolve("run.yaml").config.teacher.model_to_load()
    assert without_weights(model).config.num_hidden_layers == 2
