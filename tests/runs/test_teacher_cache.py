"""Whole runs over a teacher cache: with the live losses, resumed, on two ranks, without the teacher."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from stillhouse.commands.app import app
from stillhouse.errors import ConfigError, TeacherError
from stillhouse.runs.estimate import estimate
from stillhouse.runs.execute import execute
from stillhouse.runs.resolve import resolve
from stillhouse.runs.teacher_cache import fill_cache, measure_bias
from stillhouse.teachers.store.maintenance import list_stores
from tests.conftest import ROOT
from tests.devices import same
from tests.small_runs import TEACHER, differences, in_child, in_two, nth, outcome, rows_of, tree, write_data

QUICK = {"validate_every": "never"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("caching")
    write_data(made)
    return made


def cached(folder: Path, cache: str, name: str, **changes: Any) -> dict[str, Any]:
    """A run of KD over a cache; `teacher` and `train` are completed."""
    teacher = {"kind": "cache", "of": TEACHER, "folder": str(folder / cache), **changes.pop("teacher", {})}
    train = {**QUICK, **changes.pop("train", {})}
    return tree(folder, name, teacher=teacher, objective="forward_kl", train=train, **changes)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder) if row["phase"] == "train"]


@pytest.fixture(scope="module")
def live(folder: Path) -> Any:
    """The losses of a run with a live teacher that sees one text at a time."""

    @functools.cache
    def made() -> list[float]:
        teacher = {"kind": "live", "path": TEACHER, "batch_invariant": True}
        run = tree(folder, "live", teacher=teacher, objective="forward_kl", train=QUICK)
        assert in_child(run) == 0
        return losses(folder / "live")

    return made


ALONE = {"of": {"kind": "live", "path": TEACHER, "batch_invariant": True}}


def test_losses_are_those_of_the_live_teacher_bit_for_bit_and_it_runs_once(folder: Path, live: Any) -> None:
    assert in_child(cached(folder, "alone", "first", teacher=ALONE)) == 0
    assert losses(folder / "first") == same(live())
    facts = json.loads((folder / "first/models.json").read_text(encoding="utf-8"))["teacher"]
    assert facts["path"] == TEACHER, "named though it stands behind a cache"
    hits = [row["cache/hits"] for row in rows_of(folder / "first") if "cache/hits" in row]
    assert hits[0] == 0.0
    assert hits[-1] == 1.0
    reading = {**ALONE, "on_miss": "error"}
    assert in_child(cached(folder, "alone", "second", teacher=reading)) == 0
    assert losses(folder / "second") == same(live()), "without the teacher's model"
    other = cached(folder, "alone", "third", teacher=ALONE, train={"micro_batch_size": 4})
    other["student"] = {**other["student"], "lora": {"rank": 2}}
    other["objective"] = "reverse_kl"
    assert in_child(other) == 0
    hits = [row["cache/hits"] for row in rows_of(folder / "third") if "cache/hits" in row]
    assert set(hits) == {1.0}, "another student, objective and micro-batch"


def test_killed_and_resumed_ends_as_straight(folder: Path) -> None:
    replay = {
        "kind": "adaptive",
        "capacity": 8,
        "cache_teacher_hidden": True,
        "student_share": 0.5,
    }
    for name, die in (("straight", None), ("killed", nth(1, "os.rename", "checkpoint-6/stillhouse.pt"))):
        run = cached(folder, name, f"replay-{name}", teacher=ALONE, responses=replay)
        run["objective"] = "skew_rkl"
        assert in_child(run, die=die) == (0 if die is None else -9)
    assert in_child(run, resume=True) == 0
    ends = [outcome(folder / f"replay-{name}") for name in ("straight", "killed")]
    for end in ends:
        for row in end["rows"]:
            for name in [name for name in row if name.startswith("cache/")]:
                del row[name]  # what was there is the one thing that differs
    assert differences(ends[0], ends[1]) == []


def test_two_ranks_share_a_cache(folder: Path) -> None:
    assert in_two(cached(folder, "ranks", "ranks-one")) == [0, 0]
    (store,) = list_stores(folder / "ranks")
    assert store.records == 18
    assert store.shards == 2, "each process writes to a shard of its own"
    assert in_two(cached(folder, "ranks", "ranks-two", teacher={"on_miss": "error"})) == [0, 0]


@pytest.mark.parametrize("store", ["topk", "sampled"])
def test_sparse_stores_train(folder: Path, store: str) -> None:
    options = {"topk": {"k": 8}, "sampled": {"samples": 8}}[store]
    assert in_child(cached(folder, "compact", store, teacher={"store": store, **options})) == 0
    assert losses(folder / store)[-1] < losses(folder / store)[0]


def test_what_a_sparse_store_cannot_give_is_refused_before_anything_loads(folder: Path) -> None:
    def refused(objective: Any, **teacher: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            resolve({**cached(folder, "x", "x", teacher=teacher), "objective": objective})
        return str(caught.value)

    text = refused("csd", store="topk")
    assert "csd cannot be computed from the most probable tokens and the mass of the rest" in text
    assert "store: hidden" in text
    assert "forward_kl" in text
    assert "reverse_kl cannot be computed from weighted random draws" in refused(
        "reverse_kl", store="sampled"
    )
    text = refused({"kind": "sum", "terms": ["forward_kl", "dld"]}, store="topk")
    assert "objective.terms[1]" in text
    assert "dld" in text
    assert "store: topk has no dtype" in refused("forward_kl", store="topk", dtype="int8")
    assert "sampled keeps log-probabilities" in refused("forward_kl", store="sampled", logprobs="uint8")
    assert "is a size such as" in refused("forward_kl", limit="much")
    assert "a cache itself" in refused("forward_kl", of={"kind": "cache", "of": TEACHER})
    writes = {"responses": {"kind": "generated"}, "objective": "forward_kl"}
    with pytest.raises(ConfigError, match="needs generated text from teacher"):
        resolve({**cached(folder, "x", "x", teacher={"on_miss": "error"}), **writes})


def test_a_cache_built_before_training_holds_all_that_a_run_asks(folder: Path) -> None:
    bf16 = {"precision": "bfloat16"}  # of the student's products; the teacher has a format of its own
    config = resolve(cached(folder, "built", "after-build", train=bf16)).config
    expected = estimate(config)["teacher cache, expected (GB)"] * 1e9
    assert "0.0% of 18 sequences" in fill_cache(config)
    assert "100.0% of 18 sequences" in fill_cache(config, batch_size=5), "a second build passes over it"
    (store,) = list_stores(folder / "built")
    assert 0.7 < store.bytes / expected < 1.3
    reading = cached(folder, "built", "after-build", teacher={"on_miss": "error"}, train=bf16)
    assert in_child(reading) == 0
    with pytest.raises(ConfigError, match=r"teacher.on_miss.*built where the teacher is"):
        fill_cache(resolve(reading).config)


def test_text_that_the_teacher_writes_once_is_built_too(folder: Path) -> None:
    pairs = {"kind": "pairs", "refresh": "epoch"}
    run = cached(folder, "written-cache", "written", responses=pairs)
    run["objective"] = {"teacher": "skew_kl", "student": "skew_rkl"}
    fill_cache(resolve(run).config)
    (store,) = list_stores(folder / "written-cache")
    assert store.records == 18
    assert list((folder / "written" / "responses").iterdir()), "the run will read it"


def test_a_run_without_the_teacher_says_what_is_missing(folder: Path) -> None:
    run = cached(folder, "nothing", "nothing", teacher={"on_miss": "error"})
    with pytest.raises(TeacherError, match="stillhouse cache build"):
        execute(resolve(run))
    assert not (folder / "nothing" / "state.json").exists()


def test_the_page_on_caches_is_true() -> None:
    page = (ROOT / "docs" / "teacher-cache.md").read_text(encoding="utf-8")
    whole, _, without = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    found = estimate(resolve(yaml.safe_load(whole)).config)
    assert found["teacher cache, expected (GB)"] > 0
    merged = {**yaml.safe_load(whole), **yaml.safe_load(without), "student": {"path": TEACHER}}
    assert resolve(merged).config.teacher.model_to_load() is None  # type: ignore[union-attr]
    verbs = set(typer.main.get_command(app).commands["cache"].commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^stillhouse cache (\w+)", page, flags=re.MULTILINE)) == verbs


def test_bias_says_how_far_each_store_is_from_the_live_teacher(folder: Path) -> None:
    loss, rows, refused = measure_bias(resolve(cached(folder, "b", "b")).config, prompts=6)
    found = {row.name: row for row in rows}
    assert refused == []
    assert found["hidden-bfloat16"].loss_error == 0.0, "the teacher's own format"
    assert found["hidden-bfloat16"].gradient_error == 0.0
    assert 0 < found["hidden-int8"].gradient_error < 0.1
    tops = [found[f"topk{k}-float16-v1024"] for k in (8, 32, 128)]
    assert all(row.loss < loss for row in tops), "a tail in one piece hides some of the loss"
    assert tops[0].gradient_error > tops[1].gradient_error > tops[2].gradient_error
    drawn = found["sampled64-t1-float16-v1024"]
    assert drawn.mean_gradient_error < drawn.gradient_error
    assert drawn.bytes_per_token < found["hidden-bfloat16"].bytes_per_token
    json.dumps([row.bytes_per_token for row in rows])


def test_bias_names_the_stores_that_an_objective_cannot_use(folder: Path) -> None:
    run = {**cached(folder, "b", "c"), "objective": "csd"}
    _, rows, refused = measure_bias(resolve(run).config, prompts=2)
    assert all(row.name.startswith("hidden") for row in rows)
    assert "topk32-uint8-v1024" in refused
