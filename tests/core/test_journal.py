"""What an interruption has left is read whatever it did to the file, and damage costs its own line alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.core.journal import Journal, content_digest

HEADER = {"weights": "5f0c", "seeds": (1, 2)}


def kept(path: Path) -> Journal:
    journal = Journal(path, HEADER)
    for key in ("a", "b"):
        journal.put(key, {"answers": [key]})
    return journal


def test_a_line_that_was_cut_is_work_to_do_and_spoils_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    kept(path)
    path.write_text(path.read_text("utf-8")[:-9], "utf-8")
    again = Journal(path, HEADER)
    assert again.get("a") == {"answers": ["a"]}
    assert again.get("b") is None
    again.put("c", 3)
    third = Journal(path, HEADER)
    assert (third.get("a"), third.get("b"), third.get("c")) == ({"answers": ["a"]}, None, 3)


@pytest.mark.parametrize("damage", ["\x00\x00\x00", "[1, 2]", '{"key": "b"}', "{"])
def test_what_cannot_be_read_is_done_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "kept.jsonl"
    kept(path)
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], damage, *lines[2:]]) + "\n", "utf-8")
    again = Journal(path, HEADER)
    assert (again.get("a"), again.get("b")) == ({"answers": ["a"]}, {"answers": ["b"]})
    path.write_bytes(b"\xff\xfe" + path.read_bytes())
    assert Journal(path, HEADER).get("a") is None


def test_pieces_of_another_computation_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    kept(path)
    other = Journal(path, {**HEADER, "weights": "77aa"})
    assert other.get("a") is None
    assert len(other) == 0
    other.put("a", 1)
    assert Journal(path, HEADER).get("a") is None
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"header": {"weights": "77aa", "seeds": [1, 2]}},
        {"key": "a", "value": 1},
    ]


def test_a_kill_within_the_header_leaves_a_file_that_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    kept(path)
    path.write_bytes(path.read_bytes()[:9])
    journal = Journal(path, HEADER)
    assert len(journal) == 0
    journal.put("a", 1)
    assert Journal(path, HEADER).get("a") == 1


def test_without_a_header_a_damaged_or_torn_line_is_computed_again_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "answers.jsonl"
    journal = Journal(path)
    bodies: list[dict[str, Any]] = [
        {"prompt": f"Größe {number}\u2028 北京", "n": number} for number in range(4)
    ]
    for body in bodies:
        journal.put(content_digest(body), {"text": body["prompt"]})
    reordered = dict(reversed(bodies[2].items()))
    assert Journal(path).get(content_digest(reordered)) == {"text": bodies[2]["prompt"]}
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1][:30] + b"\n", lines[2], lines[3][:-5]]))
    again = Journal(path)
    assert [again.get(content_digest(body)) is not None for body in bodies] == [True, False, True, False]
    assert f"{path}: 1 damaged lines" in caplog.text
    again.put(content_digest(bodies[3]), "new")
    assert Journal(path).get(content_digest(bodies[3])) == "new"
    path.write_bytes(b"\xff" + path.read_bytes())
    assert Journal(path).get(content_digest(bodies[3])) == "new", "there is no line that the others need"


def test_without_a_path_nothing_outlives_the_process() -> None:
    journal = Journal()
    journal.put("a", 1)
    assert journal.get("a") == 1
    assert Journal().get("a") is None


def test_what_another_process_has_kept_is_known_and_left_to_it(tmp_path: Path) -> None:
    own, theirs = tmp_path / "answers.jsonl", tmp_path / "answers-1.jsonl"
    Journal(theirs).put("a", "of the other")
    kept = theirs.read_bytes()
    journal = Journal(own, others=[theirs])
    assert journal.get("a") == "of the other"
    journal.put("b", "own")
    assert theirs.read_bytes() == kept
    assert len(Journal(own)) == 1
