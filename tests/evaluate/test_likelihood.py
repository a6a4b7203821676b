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


def test_what_each_prompt_adds_makes_the_means() -> None:
    """Sums by prompt over all responses to it, whatever the batches; two responses to x, one to y."""
    student, teacher = tiny.model(1).eval(), tiny.model(2).eval()
    y = Response(Prompt("y", (2, 7), "y"), (4, 4, 9, 0), "student")
    some = [*responses((5, 6, 0), (8, 0)), y]
    found = likelihood(student, some, 0, teacher=teacher, batch_size=2)
    alone = likelihood(student, [y], 0, teacher=teacher)
    assert found.fidelity is not None
    assert alone.fidelity is not None
    assert {id: own["loss"][1] for id, own in found.sums.items()} == {"x": 5, "y": 4}
    means = {"loss": (found.loss, alone.loss)}
    for name, mean in found.fidelity.as_metrics().items():
        means[name] = (mean, alone.fidelity.as_metrics()[name])
    for name, (both, of_y) in means.items():
        total = sum(own[name][0] for own in found.sums.values())
        assert total / 9 == pytest.approx(both, rel=1e-6), name
        assert found.sums["y"][name][0] / 4 == pytest.approx(of_y, rel=1e-5), name


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
