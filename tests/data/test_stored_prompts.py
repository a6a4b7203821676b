"""Prompts of large data sets are on disk, and are those of small ones."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from toy_tokenizers import byte_tokenizer

from stillhouse.core.types import Prompt
from stillhouse.data import Data, DataConfig, load_data, stored_prompts
from stillhouse.data.stored_prompts import StoredPrompts

TOKENIZER = byte_tokenizer()
_held: list[StoredPrompts] = []


def _read(place: int) -> Prompt:
    return _held[0][place]


def loaded(path: Path) -> Data:
    rows = [{"instruction": f"say {n}", "output": f"{n}" * (n % 4), "kind": n} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"train": [{"path": str(path)}, {"path": str(path), "weight": 2}], "valid": str(path)}
    options = {"template": "plain", "no_response": "drop", "ignore": ["kind"]}
    return load_data(DataConfig.model_validate({**sets, **options}), TOKENIZER, needs={"responses"})


def test_many_prompts_are_those_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = loaded(tmp_path / "rows.jsonl")
    assert isinstance(few.train, tuple)
    monkeypatch.setattr(stored_prompts, "IN_MEMORY", 7)
    many = loaded(tmp_path / "rows.jsonl")
    assert isinstance(many.train, StoredPrompts)
    assert tuple(many.train) == few.train
    assert [prompt.fields for prompt in many.train] == [prompt.fields for prompt in few.train]
    assert many.report == few.report
    assert many.train[-1] == few.train[-1]
    assert tuple(many.train[5:50:3][2:]) == few.train[5:50:3][2:]
    assert len(many.train[:12]) == 12


def test_they_take_eight_bytes_each_and_other_processes_read_them(tmp_path: Path) -> None:
    few = loaded(tmp_path / "rows.jsonl").train
    many = StoredPrompts(list(few) * 50)
    assert many.nbytes == 8 * (len(many) + 1)
    _held[:] = [many]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(_read, range(200), chunksize=7)
    assert found == [few[place % len(few)] for place in range(200)]
