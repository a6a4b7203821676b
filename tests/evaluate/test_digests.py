"""Digests of prompts say whether two evaluations asked the same."""

from __future__ import annotations

from stillhouse.core.types import Prompt
from stillhouse.evaluate.generation import questions_digest


def test_the_same_questions_have_one_digest_whatever_the_template() -> None:
    fields = {"prompt": "A fruit?", "input": ""}
    one = Prompt("x:1", (5, 9), "A fruit?", references=("Fig",), fields=fields)
    chat = Prompt("y:7", (1, 5, 9, 2), "<user>A fruit?</user>", references=("Fig",), fields=fields)
    other = Prompt("x:1", (5, 9), "A fruit?", references=("Pear",), fields=fields)
    assert questions_digest([one]) == questions_digest([chat])
    assert questions_digest([one]) != questions_digest([other])
    assert questions_digest([one]) != questions_digest([one, one])
