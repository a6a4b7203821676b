"""The prompts of large data sets are on disk, made by any number of processes, as those of small ones."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import pickle
import resource
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import byte_tokenizer

from stillhouse.core.types import Prompt
from stillhouse.data import Data, DataConfig, chunks, load_data
from stillhouse.data.datasets import base
from stillhouse.data.stored_prompts import StoredPrompts, packed, unpacked
from stillhouse.errors import DataError, EnvironmentFault

TOKENIZER = byte_tokenizer()
_PROCESS = os.getpid()
_held: list[StoredPrompts] = []


class _EndsOtherProcesses(type(TOKENIZER)):  # type: ignore[misc]
    """A tokenizer that no process but this one survives."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        if os.getpid() != _PROCESS:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*given, **options)


def _read(place: int) -> Prompt:
    return _held[0][place]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is large, and has several chunks."""
    monkeypatch.setattr(base, "LARGE_BYTES", 0)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)


def write(path: Path) -> None:
    rows = [{"instruction": f"say {n}", "output": f"{n}" * (n % 4), "kind": n} for n in range(40)]
    rows[5] = {"text": "plain"}
    rows[11]["output"] = ["a", "b"]
    rows[12]["instruction"] = " "
    rows[21]["instruction"] = "long " * 400
    lines = [json.dumps(row) for row in rows]
    lines[15] = lines[33] = "{"
    path.write_text("\n".join(lines))


def loaded(path: Path, tokenizer: Any = TOKENIZER, **options: Any) -> Data:
    train = [{"path": str(path), "each_output": True}, {"path": str(path), "weight": 2, "limit": 30}]
    values = {"train": train, "valid": {"path": str(path), "labelled": 20}}
    defaults = {"template": "plain", "no_response": "drop", "ignore": ["kind"], "bad_rows": "drop"}
    defaults["token_cache"] = False
    config = DataConfig.model_validate({**values, **defaults, **options})
    return load_data(config, tokenizer, needs={"responses"})


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("workers", [1, 2])
def test_many_prompts_are_those_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    write(tmp_path / "rows.jsonl")
    many = loaded(tmp_path / "rows.jsonl", workers=workers)
    monkeypatch.setattr(base, "LARGE_BYTES", 2**23)
    few = loaded(tmp_path / "rows.jsonl")
    assert isinstance(few.train, tuple)
    assert isinstance(many.train, StoredPrompts)
    assert tuple(many.train) == few.train
    assert [prompt.fields for prompt in many.train] == [prompt.fields for prompt in few.train]
    assert [prompt.facts for prompt in many.train] == [prompt.facts for prompt in few.train]
    assert json.dumps(many.report) == json.dumps(few.report)
    assert few.report["sets"][0]["dropped"]["not JSON"] == 2 + 1
    assert many.train[-1] == few.train[-1]
    assert tuple(many.train[5:50:3][2:]) == few.train[5:50:3][2:]
    assert len(many.train[:12]) == 12


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("rows.jsonl:16: is not JSON", {"no_response": "drop"}),
        ("rows.jsonl:6: holds plain text", {"no_response": "drop"}),
        ("no row has a field 'inputs'", {"bad_rows": "drop", "input": "inputs"}),
    ],
)
def test_the_first_fault_is_told_with_any_number_of_processes(
    tmp_path: Path, workers: int, fault: str, options: dict[str, Any]
) -> None:
    write(tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    if "JSON" in fault:
        lines[5] = lines[4]
    fields = {"prompt": "instruction", "input": options["input"]} if "input" in options else {}
    rules = {name: value for name, value in options.items() if name != "input"}
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    train = {"path": str(tmp_path / "rows.jsonl"), "fields": fields}
    config = DataConfig.model_validate(
        {"train": train, "template": "plain", "workers": workers, "token_cache": False, **rules}
    )
    with pytest.raises(DataError, match=fault):
        load_data(config, TOKENIZER)


@pytest.mark.usefixtures("large")
def test_a_context_that_shows_the_row_before_shows_it_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.jsonl")
    context = {"teacher_context": "{other_prompt} {prompt}", "workers": 2}
    many = loaded(tmp_path / "rows.jsonl", **context).train
    monkeypatch.setattr(base, "LARGE_BYTES", 2**23)
    assert tuple(many) == loaded(tmp_path / "rows.jsonl", **context).train


@pytest.mark.usefixtures("large")
def test_they_take_bytes_by_the_chunk_and_other_processes_read_them(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl")
    many = loaded(tmp_path / "rows.jsonl").train
    assert isinstance(many, StoredPrompts)
    assert many.nbytes < 8 * len(many)
    few = tuple(many)
    _held[:] = [many]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(_read, range(len(few)), chunksize=7)
    assert tuple(found) == few


def test_a_stored_prompt_is_data_and_nothing_that_could_run() -> None:
    facts = {"deep": [{"a": None}, 1.5, b"x"], "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)}
    found: Counter[str] = Counter()
    prompt = Prompt("train:1", (5, 9), "?", facts=facts, references=("Fig",))
    assert unpacked(packed(prompt, found)).facts == facts
    assert not found
    content = packed(Prompt("train:1", (5,), "?", facts={"run": json.dumps, "where": Path("x")}), found)
    assert set(found) == {"builtins.function", "pathlib.PosixPath"}
    with pytest.raises(pickle.UnpicklingError, match="is no data"):
        unpacked(content)
    assert unpacked(content, own=True).facts["where"] == Path("x")


@pytest.mark.usefixtures("large")
def test_a_full_disk_and_a_killed_process_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(EnvironmentFault, match=f"{tmp_path}.*: the disk is full"):
            loaded(tmp_path / "rows.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = _EndsOtherProcesses
    with pytest.raises(EnvironmentFault, match=r"data\.train: one of 2 .* Set data\.workers to fewer"):
        loaded(tmp_path / "rows.jsonl", tokenizer, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
