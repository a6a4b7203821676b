"""ROUGE-L, diversity and lengths against the libraries called by hand."""

from __future__ import annotations

from statistics import fmean

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from stillhouse.errors import DataError
from stillhouse.evaluate.metrics.text import distinct_n, length_statistics, rouge_l, self_bleu

RESPONSES = ["The cats were sitting on the mat.", "Green Eggs is a cheap pub", "", "日本語"]
REFERENCES = [
    ["A cat sat on a mat", "The cat sits on the mat"],
    ["Green Eggs is a pub", "A cheap pub called Green Eggs", "Eggs"],
    ["nothing here"],
    ["日本語"],
]


def test_rouge_equals_the_package_and_takes_the_best_reference():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    by_hand = [
        100 * max(scorer.score(reference, response)["rougeL"].fmeasure for reference in references)
        for response, references in zip(RESPONSES, REFERENCES, strict=True)
    ]
    scores = rouge_l(RESPONSES, REFERENCES)
    assert scores == pytest.approx(by_hand)
    assert scores[2:] == [0.0, 0.0]


def test_rouge_uses_the_stemmer():
    assert rouge_l(["cats sitting"], [["cat sits"]]) == [100.0]


def test_rouge_refuses_what_it_cannot_score():
    with pytest.raises(DataError, match="no responses"):
        rouge_l([], [])
    with pytest.raises(DataError, match="row 2 has no reference"):
        rouge_l(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="2 responses"):
        rouge_l(["a", "b"], [["a"]])


def test_distinct_n_by_hand():
    rows = [["a", "b", "a", "b"], ["b", "a"], ["c"]]
    assert distinct_n(rows, 1) == 3 / 7
    assert distinct_n(rows, 2) == 2 / 4
    assert distinct_n([(5, 5, 5)], 1) == 1 / 3
    assert distinct_n([["a"]], 2) == 0.0


def test_self_bleu_equals_sacrebleu():
    texts = ["the cat sat on the mat today", "the cat sat on the chair", "a dog ran over the green field"]
    by_hand = [
        sacrebleu.sentence_bleu(text, [other for other in texts if other is not text]).score for text in texts
    ]
    assert self_bleu(texts) == pytest.approx(fmean(by_hand))
    assert self_bleu(["the same words in a row"] * 3) == pytest.approx(100.0)


def test_self_bleu_compares_no_more_than_the_limit():
    texts = ["one two three four five"] * 2 + ["six seven eight nine ten"] * 2
    assert self_bleu(texts, limit=2) < 20 < self_bleu(texts)
    with pytest.raises(DataError, match="two responses"):
        self_bleu(["alone"])


def test_lengths_by_hand():
    assert length_statistics([2, 4, 9, 5], [True, True, False, True]) == {
        "mean_length": 5.0,
        "median_length": 4.5,
        "max_length": 9,
        "finished": 0.75,
    }
    with pytest.raises(DataError):
        length_statistics([], [])
