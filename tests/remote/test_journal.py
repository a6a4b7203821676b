"""Answers are kept by what was asked, and damage costs its own line alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.remote.journal import Journal


def test_a_damaged_or_torn_line_is_asked_for_again_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "answers.jsonl"
    journal = Journal(path)
    bodies = [{"prompt": f"Größe {number}\u2028 北京", "n": number} for number in range(4)]
    for body in bodies:
        journal.put(body, {"text": body["prompt"]})
    assert Journal(path).get(dict(reversed(bodies[2].items()))) == {"text": bodies[2]["prompt"]}
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1][:30] + b"\n", lines[2], lines[3][:-5]]))
    again = Journal(path)
    assert [again.get(body) is not None for body in bodies] == [True, False, True, False]
    assert f"{path}: 1 lines are damaged" in caplog.text
    again.put(bodies[3], "new")
    assert Journal(path).get(bodies[3]) == "new"
