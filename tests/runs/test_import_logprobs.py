"""Log-probabilities that exist already: vLLM's and columns of tables, checked, counted, trained on."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

from stillhouse.commands.app import app
from stillhouse.data import load_data
from stillhouse.errors import ConfigError, DataError
from stillhouse.files import write_jsonl
from stillhouse.models import TeacherModel, load_tokenizer
from stillhouse.runs.build import assemble
from stillhouse.runs.estimate import estimate
from stillhouse.runs.resolve import resolve
from stillhouse.runs.teacher_import import import_logprobs
from tests.conftest import ROOT
from tests.small_runs import TEACHER, in_child, rows_of, tree, write_data
from tests.vllm_like import DemoTeacher

K = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("imports")
    write_data(made)
    return made


@pytest.fixture(scope="module")
def dump(folder: Path) -> list[dict[str, Any]]:
    """What vLLM would give for the training rows: the response's tokens as they were scored."""
    demo = DemoTeacher()
    tokenizer = load_tokenizer(TeacherModel(path=TEACHER))
    rows = []
    for prompt in load_data(resolve(config_of(folder, "x", "x")).config.data, tokenizer).train:
        assert prompt.response_ids is not None
        scores = demo.scores((*prompt.token_ids, *prompt.response_ids), K)
        for position in scores[1:]:
            assert position is not None
            for token, entry in position.items():
                entry["decoded_token"] = tokenizer.decode([int(token)])
        rows.append(
            {
                "prompt": prompt.text,
                "prompt_token_ids": list(prompt.token_ids),
                "token_ids": list(prompt.response_ids),
                "logprobs": scores[len(prompt.token_ids) :],
            }
        )
    return rows


def config_of(folder: Path, name: str, store: str, **teacher: Any) -> dict[str, Any]:
    train = {"validate_every": "never", "save_every": "never"}
    known = {"kind": "imported", "name": "demo", "k": K, "folder": str(folder / store), **teacher}
    return tree(folder, name, teacher=known, objective="forward_kl", train=train)


def imported(folder: Path, rows: list[dict[str, Any]], store: str, **options: Any) -> list[str]:
    path = folder / f"{store}.jsonl"
    write_jsonl(path, rows)
    return import_logprobs(resolve(config_of(folder, "x", store)).config, [path], **options)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(folder) if row["phase"] == "train"]


def columns(row: dict[str, Any]) -> dict[str, Any]:
    """The same as columns of ids and log-probabilities."""
    top = [sorted(one.items(), key=lambda item: item[1]["rank"]) for one in row["logprobs"]]
    return {
        "prompt_ids": row["prompt_token_ids"],
        "response_ids": row["token_ids"],
        "topk_ids": [[int(token) for token, _ in one] for one in top],
        "topk_logprobs": [[entry["logprob"] for _, entry in one] for one in top],
    }


def test_vllms_files_train_as_the_cache_of_the_teacher_itself(
    folder: Path, dump: list[dict[str, Any]]
) -> None:
    lines = imported(folder, dump, "vllm")
    positions = sum(len(row["token_ids"]) for row in dump)
    assert lines[0].startswith(f"18 rows read, 18 kept with {positions} positions")
    assert lines[-1] == "18 of the 18 responses of data.train are there"
    assert in_child(config_of(folder, "vllm-run", "vllm")) == 0
    cached = config_of(folder, "cached-run", "cached")
    cached["teacher"] = {"kind": "cache", "of": TEACHER, "store": "topk", "k": K, "logprobs": "float32"}
    cached["teacher"]["folder"] = str(folder / "cached")
    assert in_child(cached) == 0
    assert losses(folder / "vllm-run") == pytest.approx(losses(folder / "cached-run"), abs=3e-3)


def whole_text(row: dict[str, Any]) -> dict[str, Any]:
    """As prompt_logprobs of prompt and response together."""
    filler = [None, *({"1": {"logprob": -0.5}} for _ in row["prompt_token_ids"][1:])]
    ids = [*row["prompt_token_ids"], *row["token_ids"]]
    answer = {"prompt_logprobs": [*filler, *row["logprobs"]], "prompt_token_ids": ids}
    return {"choices": [answer], "prompt_length": len(row["prompt_token_ids"])}


@pytest.mark.parametrize(
    "form",
    [
        columns,
        whole_text,
        lambda row: {"prompt_token_ids": row["prompt_token_ids"], "outputs": [row]},
        lambda row: {"prompt": row["prompt"], "logprobs": row["logprobs"]},
    ],
    ids=["columns", "prompt_logprobs", "generate", "by the text of the prompt"],
)
def test_every_form_gives_the_same_records(
    folder: Path, dump: list[dict[str, Any]], form: Callable[[dict[str, Any]], dict[str, Any]], request: Any
) -> None:
    store = request.node.name[-12:].strip("]").replace(" ", "-")
    imported(folder, dump, f"{store}-plain")
    lines = imported(folder, [form(row) for row in dump], store)
    assert lines[-1].startswith("18 of the 18")
    plain, other = (
        assemble(resolve(config_of(folder, "x", name)).config) for name in (f"{store}-plain", store)
    )
    batches = [one.data.train[0].reference_response() for one in (plain, other)]
    assert batches[0] == batches[1]
    shards = [sorted((folder / name).glob("*/shard*")) for name in (f"{store}-plain", store)]
    assert [path.stat().st_size for path in shards[0]] == [path.stat().st_size for path in shards[1]]


def test_a_parquet_table_with_a_part_of_the_rows_trains_on_that_part(
    folder: Path, dump: list[dict[str, Any]]
) -> None:
    path = folder / "some.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns(row) for row in dump[:11]]), path)
    config = config_of(folder, "part", "part-store", on_miss="skip")
    lines = import_logprobs(resolve(config).config, [path])
    assert lines[-1] == "11 of the 18 responses of data.train are there"
    found = estimate(resolve(config).config)
    assert found["prompts"] == 11
    assert in_child(config) == 0
    data = json.loads((folder / "part" / "data.json").read_text(encoding="utf-8"))
    assert data["sets"][0]["dropped"] == {"not in the store of teacher": 7}
    assert data["sets"][0]["kept"] == 11
    assert in_child(config_of(folder, "part-error", "part-store")) != 0, "on_miss: error ends the run"


def spoilt(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def made(row: dict[str, Any]) -> dict[str, Any]:
        row = copy.deepcopy(row)
        change(row)
        return row

    return made


def first(row: dict[str, Any]) -> Any:
    """The entry of rank 1 at the third position."""
    return min(row["logprobs"][2].values(), key=lambda entry: entry["rank"])


FAULTS: dict[str, tuple[Any, str, str]] = {
    "mass": (
        spoilt(
            lambda row: [one.update(logprob=-0.1) or one.pop("rank") for one in row["logprobs"][2].values()]
        ),
        "sum to",
        "probabilities of more than 1",
    ),
    "positive": (
        spoilt(lambda row: first(row).update(logprob=0.7)),
        "no log-probability",
        "no log-probability",
    ),
    "nan": (
        spoilt(lambda row: first(row).update(logprob=math.nan)),
        "no log-probability",
        "no log-probability",
    ),
    "ranks": (
        spoilt(lambda row: first(row).update(rank=900)),
        "rank 900|more probable than",
        "ranks against log-probabilities",
    ),
    "shifted": (
        spoilt(lambda row: row.update(logprobs=[*row["logprobs"][1:], row["logprobs"][-1]])),
        "shifted by one",
        "shifted by one",
    ),
    "too short": (
        spoilt(lambda row: row["logprobs"].pop()),
        "9 positions for 10 response tokens",
        "lengths that do not match",
    ),
    "no such id": (
        spoilt(lambda row: row["token_ids"].__setitem__(0, 99999)),
        "tokenizer has ids 0 to 1023",
        "token ids out of range",
    ),
    "another tokenizer": (
        spoilt(lambda row: first(row).update(decoded_token="zzz")),
        "for the student's tokenizer",
        "tokens of another tokenizer",
    ),
    "another text": (
        spoilt(lambda row: row.update(text="something else")),
        "its text is",
        "token ids that are not the text",
    ),
    "nothing": (lambda _: {"a": 1}, "neither logprobs nor", "not log-probabilities"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_what_it_says_is_refused_or_counted(
    folder: Path, dump: list[dict[str, Any]], name: str
) -> None:
    change, message, reason = FAULTS[name]
    rows = [dump[0], change(dump[1]), dump[2]]
    with pytest.raises(DataError, match=message) as told:
        imported(folder, rows, "faults")
    assert "faults.jsonl:2" in str(told.value)
    assert "--bad-rows drop" in str(told.value)
    lines = imported(folder, rows, "faults", bad_rows="drop")
    assert lines[0].startswith("3 rows read, 2 kept")
    assert lines[1] == f"1 dropped: {reason}"


def test_a_further_teacher_is_asked_about_the_prompts_that_it_reads(
    folder: Path, dump: list[dict[str, Any]]
) -> None:
    config = config_of(folder, "x", "context", on_miss="skip")
    config["teachers"] = {"second": config["teacher"]}
    config["teacher"] = {"kind": "live", "path": TEACHER}
    config["objective"] = {"kind": "forward_kl", "teacher_model": "second"}
    config["data"]["teacher_context"] = {"second": "Say: {prompt}"}
    resolved = resolve(config).config
    tokenizer = load_tokenizer(TeacherModel(path=TEACHER))
    prompts = load_data(resolved.data, tokenizer, needs={"responses"}).train
    rows = [
        {**row, "prompt_token_ids": list(prompt.context_ids["second"])}
        for row, prompt in zip(dump[:7], prompts, strict=False)
    ]
    write_jsonl(folder / "context.jsonl", rows)
    lines = import_logprobs(resolved, [folder / "context.jsonl"], "second")
    assert lines[-1] == "7 of the 18 responses of data.train are there"
    assert len(assemble(resolved).data.train) == 7


def test_columns_that_are_shifted_are_refused_as_a_whole(folder: Path, dump: list[dict[str, Any]]) -> None:
    rows = [columns(row) for row in dump]
    for row in rows:
        for name in ("topk_ids", "topk_logprobs"):
            row[name] = [*row[name][1:], row[name][-1]]
    with pytest.raises(DataError, match=r"shifted by one: .* position before .*Nothing was imported"):
        imported(folder, rows, "shifted", bad_rows="drop")
    assert not (folder / "shifted").exists()


def test_a_teacher_without_a_store_says_how_to_fill_it(folder: Path, dump: list[dict[str, Any]]) -> None:
    with pytest.raises(Exception, match=r"stillhouse cache import RUN.YAML FILE"):
        assemble(resolve(config_of(folder, "x", "empty")).config)
    live = config_of(folder, "x", "x")
    live["teacher"] = {"kind": "live", "path": TEACHER}
    with pytest.raises(ConfigError, match="has no store to import into"):
        import_logprobs(resolve(live).config, [])
    skip = {**config_of(folder, "x", "x", on_miss="skip"), "responses": {"kind": "on_policy"}}
    with pytest.raises(ConfigError, match=r"teacher.on_miss.*skip leaves out rows"):
        resolve(skip)


def test_the_page_imports_and_trains_as_it_stands(
    dump: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "teacher-cache.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n# imported\.yaml\n(.*?)```", page, flags=re.DOTALL)
    (command,) = re.findall(r"^stillhouse (cache import imported.*)$", page, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("imported.yaml").write_text(text, encoding="utf-8")
    config = resolve(yaml.safe_load(text)).config
    prompts = load_data(config.data, load_tokenizer(config.student)).train
    demo = DemoTeacher()
    rows = []
    for prompt in prompts[:12]:
        ids = [*prompt.token_ids, *(prompt.response_ids or ())]
        row = {"prompt_token_ids": ids, "prompt_logprobs": demo.scores(ids, 20)}
        rows.append({**row, "prompt_length": len(prompt.token_ids)})
    write_jsonl(Path("dump.jsonl"), [*rows, {"prompt": "?"}])
    done = CliRunner().invoke(app, shlex.split(command))
    assert done.exit_code == 0, done.output
    assert "13 rows read, 12 kept" in " ".join(done.output.split())
    assert in_child(yaml.safe_load(text)) == 0
    assert len(losses(tmp_path / "runs" / "from-logprobs")) > 0
