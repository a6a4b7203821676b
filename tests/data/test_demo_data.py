"""The demo data is what the script derives from its source; no prompt is in two files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import stillhouse.demo.make_data as make_data
from stillhouse.files import read_jsonl

SHARED = Path(os.environ.get("STILLHOUSE_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@pytest.mark.needs_shared
@pytest.mark.parametrize("name", make_data.SETS)
def test_the_files_follow_from_their_source(name: str) -> None:
    source = SHARED / "data" / "instruct" / f"e2e_nlg_{name}.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    assert make_data.collapsed(lines) == read_jsonl(make_data.HERE / f"{name}.jsonl")


def test_no_prompt_is_in_two_files() -> None:
    sets = [
        {row["prompt"] for row in read_jsonl(make_data.HERE / f"{name}.jsonl")} for name in make_data.SETS
    ]
    assert [len(prompts) for prompts in sets] == [3101, 80, 150]
    assert len(set().union(*sets)) == 3331
