"""Objectives ask for models by name: a reference, several teachers by weight, one for each row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillhouse.errors import ConfigError, DataError
from stillhouse.runs.build import assemble
from stillhouse.runs.estimate import estimate
from stillhouse.runs.resolve import resolve
from stillhouse.runs.teacher_cache import fill_cache, measure_bias
from stillhouse.teachers.store.maintenance import list_stores
from tests.devices import same
from tests.small_runs import differences, in_child, nth, outcome, rows_of, tree, write_data

LENGTH = {"max_steps": 24, "batch_size": 6, "micro_batch_size": 3, "lr": 5e-3, "log_every": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose rows name a teacher, and a second model of the demonstration's tokenizer."""
    made = tmp_path_factory.mktemp("teachers")
    write_data(made, rows=24, valid=8)
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        row["teacher"] = ("main", "second")[number % 2]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (made / "train.jsonl").write_text(text, encoding="utf-8")
    config = tree(made, "second", recipe="sft", train={**LENGTH, "max_steps": 12})
    del config["teacher"]
    assert in_child(config) == 0
    return made


def config_of(folder: Path, name: str, objective: Any, other: str, **changes: Any) -> dict[str, Any]:
    second = {other: {"kind": "live", "path": str(folder / "second" / "student")}}
    train = {**LENGTH, **changes.pop("train", {})}
    return tree(folder, name, objective=objective, teachers=second, train=train, **changes)


def train_losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows_of(run) if row["phase"] == "train"]


def validation(run: Path) -> list[float]:
    return [row["loss"] for row in rows_of(run) if row["phase"] == "valid"]


@pytest.mark.parametrize("kind", ["advantage", "aligned_teacher"])
def test_objectives_with_a_reference_train(folder: Path, kind: str) -> None:
    assert in_child(config_of(folder, kind, {"kind": kind}, "reference")) == 0
    losses = train_losses(folder / kind)
    assert losses[-1] < losses[0]
    models = json.loads((folder / kind / "models.json").read_text(encoding="utf-8"))
    assert models["teachers.reference"]["parameters"] == models["student"]["parameters"]
    card = (folder / kind / "student" / "README.md").read_text(encoding="utf-8")
    size = f"{models['student']['parameters']:,} parameters"
    assert f" and `student` (reference, {size}) with Stillhouse" in card


def test_the_reference_decides_where_the_student_goes(folder: Path) -> None:
    """With the teacher as its own reference the advantage is zero, and nothing is learnt."""
    config = config_of(folder, "no-advantage", {"kind": "advantage"}, "reference")
    config["teachers"]["reference"]["path"] = config["teacher"]["path"]
    assert in_child(config) == 0
    assert train_losses(folder / "no-advantage") == pytest.approx([0.0] * 6, abs=1e-5)


def test_two_teachers_by_weight(folder: Path) -> None:
    terms = [
        {"kind": "forward_kl", "loss_weight": 0.7},
        {"kind": "forward_kl", "teacher_model": "second", "loss_weight": 0.3},
    ]
    assert in_child(config_of(folder, "weighted", {"kind": "sum", "terms": terms}, "second")) == 0
    found = validation(folder / "weighted")
    assert found[-1] < found[0] - 0.02
    alone = tree(folder, "alone", objective={"kind": "sum", "terms": terms[:1]}, train=LENGTH)
    assert in_child(alone) == 0
    assert train_losses(folder / "weighted")[0] > train_losses(folder / "alone")[0] + 0.01


BY_ROW = {"kind": "by_teacher", "objectives": {"main": "forward_kl", "second": {"kind": "jsd"}}}


def test_a_teacher_for_each_row_and_resume_equal_to_straight(folder: Path) -> None:
    train = {"max_steps": 9, "save_every": 2}
    straight = config_of(folder, "rows-straight", BY_ROW, "second", train=train)
    assert in_child(straight) == 0
    killed = config_of(folder, "rows-killed", BY_ROW, "second", train=train)
    assert in_child(killed, die=nth(2, "open", "optimizer.pt")) < 0
    assert in_child(killed, resume=True) == 0
    assert not differences(outcome(folder / "rows-straight"), outcome(folder / "rows-killed"))
    read = [row["tokens/teacher"] for row in rows_of(folder / "rows-straight") if row["phase"] == "train"]
    whole = [row["tokens/student"] for row in rows_of(folder / "rows-straight") if row["phase"] == "train"]
    assert read == whole, "each sequence is read by the teacher that its row names, and by no other"


def test_rows_that_name_an_unknown_teacher_are_refused(folder: Path) -> None:
    config = config_of(folder, "unknown", {**BY_ROW, "objectives": {"second": "forward_kl"}}, "second")
    config["teacher"] = None
    resolved = resolve(config).config
    with pytest.raises(DataError, match=r"names the teacher 'main'"):
        assemble(resolved)


@pytest.mark.parametrize("name", ["weighted", "mixture", "by-row", "by-domain", "reference"])
def test_the_page_trains_as_it_stands(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every YAML file of docs/teachers.md, with models where it says that they are."""
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"```yaml\n# {name}\.yaml\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(folder)
    with_domains(folder, {"maths": 20, "code": 4}).rename("domains.jsonl")
    for link, model in (("student", "second"), ("second-teacher", "second")):
        if not Path(link).exists():
            Path(link).symlink_to(folder / model / "student", target_is_directory=True)
    assert in_child(yaml.safe_load(text)) == 0
    assert len(train_losses(folder / "runs" / name)) == 1


def test_a_second_teacher_may_say_something_about_a_few_tokens_only(folder: Path) -> None:
    """From a cache of its most probable tokens: as many of them as there are say everything."""
    terms = [
        {"kind": "forward_kl", "loss_weight": 0.7},
        {"kind": "reverse_kl", "teacher_model": "second", "loss_weight": 0.3},
    ]
    objective = {"kind": "sum", "terms": terms}
    assert in_child(config_of(folder, "dense", objective, "second")) == 0
    sparse = config_of(folder, "sparse", objective, "second")
    live = sparse["teachers"]["second"]
    sparse["teachers"]["second"] = {
        "kind": "cache",
        "of": live,
        "store": "topk",
        "k": 512,
        "folder": str(folder / "store"),
    }
    assert in_child(sparse) == 0
    losses = train_losses(folder / "sparse")
    assert losses == pytest.approx(train_losses(folder / "dense"), rel=1e-2)


def test_caches_of_two_teachers_are_built_over_text_that_the_student_writes_once(folder: Path) -> None:
    """As ADPA's authors work: write, store what both teachers say, then train without either of them."""
    objective = {"teacher": "cross_entropy", "student": {"kind": "advantage"}}
    config = config_of(folder, "stored", objective, "reference")
    config["responses"] = {"kind": "pairs", "teacher_responses": "fixed", "refresh": "never"}
    store = {"kind": "cache", "store": "topk", "k": 16, "folder": str(folder / "both")}
    config["teacher"] = {**store, "of": config["teacher"]}
    config["teachers"]["reference"] = {**store, "of": config["teachers"]["reference"]}
    resolved = resolve(config).config
    told = fill_cache(resolved).splitlines()
    assert [line.startswith("teachers.reference: ") for line in told] == [False, True]
    assert [store.records for store in list_stores(folder / "both")] == [24, 24]
    assert {"teacher cache, expected (GB)", "teachers.reference cache, expected (GB)"} <= set(
        estimate(resolved)
    )
    for teacher in (config["teacher"], config["teachers"]["reference"]):
        teacher["on_miss"] = "error"
    assert in_child(config) == 0
    rows = [row for row in rows_of(folder / "stored") if row["phase"] == "train"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {row["cache/hits"] for row in rows} == {1.0}
    with pytest.raises(ConfigError, match=r"^teacher\.on_miss: a cache is built where the teacher is"):
        fill_cache(resolve(config).config)


def test_importance_asks_for_text_of_the_student_and_how_likely_it_was(folder: Path) -> None:
    weighed = {"kind": "advantage", "importance": "sequence"}
    config = config_of(folder, "weighed", weighed, "reference")
    with pytest.raises(ConfigError, match=r"objective\.importance.*compares with the student that wrote"):
        resolve(config)
    config["responses"] = {"kind": "generated", "by": "student", "refresh": "never"}
    with pytest.raises(ConfigError, match=r"responses.sampling.logprobs: true"):
        resolve(config)
    config["responses"]["sampling"] = {"temperature": 1.0, "logprobs": True}
    config["train"]["max_steps"] = 4
    assert in_child(config) == 0
    assert len(train_losses(folder / "weighed")) > 0


def by_row_over_caches(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """Both teachers cached, and each asked about the rows that name it."""
    config = config_of(folder, name, BY_ROW, "second", train={"max_steps": 4, "validate_every": "never"})
    for place, key in ((config, "teacher"), (config["teachers"], "second")):
        live = {**place[key], "batch_invariant": True}
        place[key] = {"kind": "cache", "of": live, "folder": str(folder / "by-rows"), **options}
    return config


def test_the_caches_of_all_teachers_are_built_each_with_its_own_rows(folder: Path) -> None:
    live = config_of(folder, "live-rows", BY_ROW, "second", train={"max_steps": 4, "validate_every": "never"})
    for teacher in (live["teacher"], live["teachers"]["second"]):
        teacher["batch_invariant"] = True
    assert in_child(live) == 0
    config = resolve(by_row_over_caches(folder, "rows")).config
    expected = estimate(config)
    line = fill_cache(config, only="second")
    assert line.startswith("teachers.second: Teacher cache: 0.0% of 12 sequences")
    both = fill_cache(config).splitlines()
    assert [line[: line.index(" of ")] for line in both] == [
        "Teacher cache: 0.0%",
        "teachers.second: Teacher cache: 100.0%",
    ]
    stores = list_stores(folder / "by-rows")
    assert [store.records for store in stores] == [12, 12]
    for store in stores:
        main = store.manifest.teacher["path"] == live["teacher"]["path"]
        size = expected[f"{'teacher' if main else 'teachers.second'} cache, expected (GB)"]
        assert 0.5 < store.bytes / (size * 1e9) < 1.5
    assert in_child(by_row_over_caches(folder, "from-caches", on_miss="error")) == 0
    assert train_losses(folder / "from-caches") == same(train_losses(folder / "live-rows"))
    row = rows_of(folder / "from-caches")[-1]
    assert row["cache/hits"] == row["cache/hits/second"] == 1.0


def test_a_cache_that_cannot_be_built_says_which(folder: Path) -> None:
    config = by_row_over_caches(folder, "rows")
    with pytest.raises(ConfigError, match=r"--teacher: no teacher is called 'secnd' \(did you mean 'second'"):
        fill_cache(resolve(config).config, only="secnd")
    config["teachers"]["second"]["on_miss"] = "error"
    with pytest.raises(ConfigError, match=r"teachers.second.on_miss: a cache is built where the teacher is"):
        fill_cache(resolve(config).config, only="second")
    config["teachers"]["second"] = config["teachers"]["second"]["of"]
    with pytest.raises(ConfigError, match=r"teachers.second: is not cached"):
        fill_cache(resolve(config).config, only="second")


def test_bias_of_the_store_of_a_second_teacher(folder: Path) -> None:
    terms = ["forward_kl", {"kind": "reverse_kl", "teacher_model": "second"}]
    config = config_of(folder, "bias", {"kind": "sum", "terms": terms}, "second")
    second = config["teachers"]["second"]
    config["teachers"]["second"] = {"kind": "cache", "of": second, "folder": str(folder / "biased")}
    _, rows, refused = measure_bias(resolve(config).config, prompts=4, name="second")
    found = {row.name: row for row in rows}
    assert found["hidden-float32"].gradient_error == 0.0
    assert found["hidden-int8"].gradient_error > 0.0
    assert any(name.startswith("sampled") for name in refused), "reverse KL needs the most probable tokens"


def with_domains(folder: Path, values: dict[str, int]) -> Path:
    """The rows with a column `domain` in place of `teacher`; so many of each value."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    domains = [name for name, count in values.items() for _ in range(count)]
    for row, domain in zip(rows, domains, strict=True):
        del row["teacher"]
        row["domain"] = domain
    path = folder / f"domains-{len(values)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_column_decides_by_domain_and_the_page_says_who_taught_what(folder: Path) -> None:
    """One teacher live, one from a cache; rows of a third domain are dropped and counted."""
    path = with_domains(folder, {"maths": 12, "code": 9, "poems": 3})
    config = config_of(folder, "domains", BY_ROW, "second", train={"max_steps": 4, "log_every": 1})
    second = {"kind": "cache", "of": config["teachers"]["second"], "folder": str(folder / "by-domain")}
    config["teachers"]["second"] = second
    routes = {"column": "domain", "teachers": {"maths": "main", "code": "second"}}
    config["data"] |= {"train": str(path), "row_teacher": routes}
    with pytest.raises(DataError, match=r"has domain 'poems', which data.row_teacher gives to no teacher"):
        assemble(resolve(config).config)
    config["data"]["bad_rows"] = "drop"
    config["output"]["report"] = True
    assert in_child(config) == 0
    rows = [row for row in rows_of(folder / "domains") if row["phase"] == "train"]
    tokens = {name: sum(row.get(f"teachers/{name}/tokens", 0) for row in rows) for name in ("main", "second")}
    assert sum(tokens.values()) == sum(row["tokens"] for row in rows)
    assert min(tokens.values()) > 0
    for row in rows:
        parts = [
            (row.get(f"teachers/{name}/loss", 0), row.get(f"teachers/{name}/tokens", 0)) for name in tokens
        ]
        mean = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
        assert mean == pytest.approx(row["loss"], rel=1e-5)
    data = json.loads((folder / "domains" / "data.json").read_text(encoding="utf-8"))
    assert data["sets"][0]["teachers"] == {"main": 12, "second": 9}
    assert data["sets"][0]["dropped"] == {"no teacher for its domain": 3}
    page = (folder / "domains" / "report.html").read_text(encoding="utf-8")
    table = page[page.index("Which teacher taught what") :]
    assert [name for name in ("main", "second") if f">{name} <span" in table] == ["main", "second"]
    assert 'data-label="Rows">12<' in table


def test_a_route_to_nobody_is_refused_before_anything_loads(folder: Path) -> None:
    config = config_of(folder, "x", BY_ROW, "second")
    config["data"]["row_teacher"] = {"teachers": {"maths": "main"}, "otherwise": "third"}
    with pytest.raises(ConfigError, match=r"data.row_teacher.*: gives rows to the teacher 'third'"):
        resolve(config)
    config["data"]["row_teacher"]["otherwise"] = "second"
    config["objective"] = {"kind": "sum", "terms": ["forward_kl", {"kind": "jsd", "teacher_model": "second"}]}
    notes = resolve(config).notes
    assert any("data.row_teacher" in note and "has no effect" in note for note in notes)


def test_a_mixture_of_distributions_trains(folder: Path) -> None:
    """One teacher whole, one by its most probable tokens from a cache."""
    mixed = {"kind": "teacher_mixture", "weights": {"main": 0.7, "second": 0.3}, "objective": "reverse_kl"}
    config = config_of(folder, "mixed", mixed, "second", train={"max_steps": 8})
    assert in_child(config) == 0
    config = config_of(folder, "mixed-sparse", mixed, "second", train={"max_steps": 8})
    of = config["teachers"]["second"]
    config["teachers"]["second"] = {"kind": "cache", "of": of, "store": "topk", "k": 1024}
    config["teachers"]["second"]["folder"] = str(folder / "mixture-store")
    assert in_child(config) == 0
    losses = train_losses(folder / "mixed-sparse")
    assert losses == pytest.approx(train_losses(folder / "mixed"), rel=5e-3)
    config["teachers"]["second"]["store"] = "sampled"
    del config["teachers"]["second"]["k"]
    with pytest.raises(ConfigError, match="teacher_mixture cannot be computed from weighted random draws"):
        resolve(config)


def test_a_further_teacher_may_have_more_tokens_behind_the_students(folder: Path) -> None:
    """Live, and from its cache without it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, more = folder / "second" / "student", folder / "more"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(more)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(more)
    terms = ["forward_kl", {"kind": "forward_kl", "teacher_model": "second"}]
    config = config_of(folder, "more-live", {"kind": "sum", "terms": terms}, "second", train={"max_steps": 2})
    live = {**config["teachers"]["second"], "path": str(more), "batch_invariant": True}
    stored = {"kind": "cache", "of": live, "folder": str(folder / "more-store")}
    for name, teacher in (("more-fill", stored), ("more-error", {**stored, "on_miss": "error"})):
        config["teachers"]["second"] = teacher
        config["name"], config["output"] = name, {"folder": str(folder / name), "report": False}
        assert in_child(config) == 0
    assert train_losses(folder / "more-fill") == train_losses(folder / "more-error")
