"""What an interrupted evaluation has kept is read whatever the interruption did to the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.core.types import Prompt
from stillhouse.evaluate.partial import Partial, digest_of_questions

HEADER = {"weights": "5f0c", "seeds": (1, 2)}


def kept(path: Path) -> Partial:
    partial = Partial(path, HEADER)
    for key in ("a", "b"):
        partial.put(key, {"answers": [key]})
    return partial


def test_a_line_that_was_cut_is_work_to_do_and_spoils_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    kept(path)
    path.write_text(path.read_text("utf-8")[:-9], "utf-8")
    again = Partial(path, HEADER)
    assert again.get("a") == {"answers": ["a"]}
    assert again.get("b") is None
    again.put("c", 3)
    third = Partial(path, HEADER)
    assert (third.get("a"), third.get("b"), third.get("c")) == ({"answers": ["a"]}, None, 3)


@pytest.mark.parametrize("damage", ["\x00\x00\x00", "[1, 2]", '{"key": "b"}', "{"])
def test_what_cannot_be_read_is_done_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "kept.jsonl"
    kept(path)
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], damage, *lines[2:]]) + "\n", "utf-8")
    again = Partial(path, HEADER)
    assert (again.get("a"), again.get("b")) == ({"answers": ["a"]}, {"answers": ["b"]})
    path.write_bytes(b"\xff\xfe" + path.read_bytes())
    assert Partial(path, HEADER).get("a") is None


def test_pieces_of_another_evaluation_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    kept(path)
    other = Partial(path, {**HEADER, "weights": "77aa"})
    assert other.get("a") is None
    other.put("a", 1)
    assert Partial(path, HEADER).get("a") is None


def test_the_same_questions_have_one_digest_whatever_the_template() -> None:
    asked = {"prompt": "A fruit?", "input": ""}
    one = Prompt("x:1", (5, 9), "A fruit?", references=("Fig",), asked=asked)
    chat = Prompt("y:7", (1, 5, 9, 2), "<user>A fruit?</user>", references=("Fig",), asked=asked)
    other = Prompt("x:1", (5, 9), "A fruit?", references=("Pear",), asked=asked)
    assert digest_of_questions([one]) == digest_of_questions([chat])
    assert digest_of_questions([one]) != digest_of_questions([other])
    assert digest_of_questions([one]) != digest_of_questions([one, one])
