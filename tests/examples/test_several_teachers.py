"""The benchmark of two teachers writes SCAN's sentences, and its result is what the page says."""

from __future__ import annotations

import json

from tests.conftest import ROOT, script

RESULT = ROOT / "benchmarks" / "results" / "several_teachers.json"


def test_commands_are_scans() -> None:
    """Sentences of the paper, and of the file that its authors published."""
    several = script(ROOT / "benchmarks" / "several_teachers.py")
    known = {row["prompt"]: (row["response"], row["domain"]) for row in several.commands()}
    assert known["look opposite left twice"] == ("LEFT LEFT LOOK LEFT LEFT LOOK", "left")
    assert known["turn around right"] == ("RIGHT RIGHT RIGHT RIGHT", "right")
    assert known["walk left after jump thrice"] == ("JUMP JUMP JUMP LEFT WALK", "left")
    assert known["run and look twice"] == ("RUN LOOK LOOK", "none")
    assert not any("left" in text.split() and "right" in text.split() for text in known)


def test_a_student_of_both_does_what_each_teacher_cannot() -> None:
    rows = {row["system"]: row for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]}
    student = rows["student, each its own rows"]
    for half, other in (("left", "right"), ("right", "left")):
        assert rows[f"teacher of {half}"][other] < 10
        assert student[half] > rows[f"teacher of {other}"][half] + 30
