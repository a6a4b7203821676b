"""Answers are normalised and scored as the VQA challenge's script does: cases of its own values."""

from __future__ import annotations

import pytest

from stillhouse.evaluate.metrics.vqa import normalized_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Red car.", "red car"),
        ("two", "2"),
        ("an apple, a pear", "apple pear"),
        ("100,978", "100978"),
        ("3.5 m.", "3.5 m"),
        (".5", ".5"),
        ("U.S.A.", "usa"),
        ("1,000 black/white", "1000 blackwhite"),
        ("well-known - (man)", "wellknown man"),
        ("black-white-", "black white"),
        ("Dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("an id", "id"),
        ("don't", "don't"),
        ("bob's", "bob's"),
        ("10:30", "10:30"),
        ("black/white", "black white"),
        ("yes!", "yes"),
        ("none", "0"),
        ("\n blue\t", "blue"),
        ("", ""),
    ],
)
def test_normalised(text: str, wanted: str) -> None:
    assert normalized_answer(text) == wanted
    assert normalized_answer(wanted) == wanted


@pytest.mark.parametrize(
    ("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_soft_accuracy_over_ten_annotators(agreeing: int, accuracy: float) -> None:
    """The values of the challenge: 0.3, 0.6, 0.9 for one, two, three of ten."""
    answers = ["a Cat"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_accuracy("cat", answers) == pytest.approx(accuracy)


def test_with_few_annotators_any_of_them_is_right() -> None:
    assert [vqa_accuracy(said, ["one", "2", "three"]) for said in ("1", "two", "four")] == [1, 1, 0]
