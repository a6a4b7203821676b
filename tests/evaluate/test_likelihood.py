"""What is measured on given text, and what a padded head may do to it."""

from __future__ import annotations

import pytest
from tests import tiny

from stillhouse.core.types import Prompt, Response
from stillhouse.errors import DataError
from stillhouse.evaluate.likelihood import likelihood

PROMPT = Prompt("x", (3, 1, 4), "x")


def responses(*ids: tuple[int, ...]) -> list[Response]:
    return [Response(PROMPT, one, "student") for one in ids]


def test_tokens_that_only_a_padded_head_has_end_what_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    """A student's head of 16 rows, a teacher's of 12, a tokenizer of 12: token 13 is nobody's."""
    student, teacher = tiny.model(1, vocab_size=16).eval(), tiny.model(2, vocab_size=12).eval()
    found = likelihood(student, responses((5, 6, 13, 7), (13, 2), (8, 0)), 0, teacher=teacher, vocab_size=12)
    known = likelihood(student, responses((5, 6), (8, 0)), 0, teacher=teacher, vocab_size=12)
    assert found == known
    assert found.tokens == 4
    assert "2 of 3 responses hold token ids from 12 on" in caplog.text
    with pytest.raises(DataError, match="no responses"):
        likelihood(student, responses((13,)), 0, teacher=teacher, vocab_size=12)
