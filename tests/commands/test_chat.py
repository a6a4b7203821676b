"""`stillhouse chat` in a pipe: the run's template and sampling, the teacher on demand, words for mistakes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from stillhouse.runs.chat import Conversation
from tests.runs.test_export_gguf import MODELS, TURNS, make
from tests.workshop import Said, Workshop


def say(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> Said:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return workshop.stillhouse("chat", *arguments)


def test_a_run_answers_as_its_model_and_so_does_its_teacher(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workshop.stillhouse("run", "run.yaml", "train.max_steps=1").code == 0
    said = say(workshop, monkeypatch, "A fruit?\n/teacher\n/history\n", "runs/kd", "--temperature", "0")
    assert said.code == 0, said.err
    own, beside = (Conversation(Path(path), {"kind": "plain"}) for path in ("runs/kd", "teacher"))
    for one in (own, beside):
        one.change("temperature=0 max_tokens=8")
    answer, other = (one.ask("A fruit?", lambda _: None) for one in (own, beside))
    assert own.sampling.max_tokens == 8, "data.max_response of the run"
    assert said.out == f"{answer}\nteacher: {other}\nuser: A fruit?\nassistant: {answer}\n"
    assert "none is remembered" in said.err
    with_teacher = say(workshop, monkeypatch, "A fruit?\n", "runs/kd", "--temperature", "0", "--teacher")
    assert with_teacher.out == f"{answer}\nteacher: {other}\n"


def test_mistakes_are_told_in_words(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    for lines, words in (
        ("/teacher\n", "nothing was asked yet"),
        ("Hi\n/teacher\n", "only the student of a run has one"),
        ("/frobnicate\n", "is not known"),
        ("/set temperature=-1\n", "must be at least 0"),
        ("/set warm\n", "write NAME=VALUE"),
    ):
        said = say(workshop, monkeypatch, lines, "student", "--template", "plain", "--max-tokens", "2")
        assert said.code == 2
        assert words in said.err
        assert "Traceback" not in said.err


def test_turns_are_remembered_where_the_template_has_them(tmp_path: Path) -> None:
    talk = Conversation(make(tmp_path, MODELS["llama"], TURNS))
    talk.change("temperature=0 max_tokens=6")
    first = talk.ask("One", lambda _: None)
    second = talk.ask("Two", lambda _: None)
    assert [turn["content"] for turn in talk.turns] == ["One", first, "Two", second]
    talk.clear()
    assert talk.ask("Two", lambda _: None) != second
