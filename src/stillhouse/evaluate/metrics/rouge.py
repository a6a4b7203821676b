"""ROUGE-L as the papers report it: F-measure, Porter stemmer, best over the references, times 100."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from stillhouse.errors import DataError


@dataclass(frozen=True, slots=True)
class RougeL:
    """ROUGE-L F-measure in percent (0 to 100).

    Example: `RougeL(mean=57.1, rows=(61.2, 53.0))`
    """

    mean: float
    """Mean over the rows, each row with the same weight."""
    rows: tuple[float, ...]
    """One score a row, in the order given."""


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str]]) -> RougeL:
    """Score each response against its references.

    With L = length of the longest common subsequence of the stemmed words, P = L / words in the response and
    R = L / words in the reference, the score is 2 P R / (P + R), the best over the references, times 100.
    Words are what the rouge-score package makes of a text (lower case, Latin letters and digits only), so
    texts in other scripts score 0.

    Source: Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", as the `rouge-score`
    package computes it.

    Args:
        responses: what the model wrote, one text a row.
        references: the right answers, one or more a row.

    Raises:
        DataError: no rows, lists of different length, or a row without a reference.
    """
    if not responses:
        raise DataError("ROUGE-L: there are no rows to score.")
    if len(responses) != len(references):
        raise DataError(f"ROUGE-L: {len(responses)} responses but references for {len(references)} rows.")
    bare = next((index for index, texts in enumerate(references) if not texts), None)
    if bare is not None:
        raise DataError(
            f"ROUGE-L: row {bare + 1} has no reference. Give each row a reference or leave such rows out."
        )
    from rouge_score.rouge_scorer import RougeScorer  # loads nltk, which takes a second

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rows = tuple(
        100.0 * scorer.score_multi(list(texts), response)["rougeL"].fmeasure
        for response, texts in zip(responses, references, strict=True)
    )
    return RougeL(mean=fmean(rows), rows=rows)


def rouge_of(responses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float | None]:
    """The score of each response to four digits; None for those without a reference."""
    answerable = [index for index, texts in enumerate(references) if texts]
    scores: list[float | None] = [None] * len(responses)
    if answerable:
        found = rouge_l([responses[index] for index in answerable], [references[i] for i in answerable])
        for index, score in zip(answerable, found.rows, strict=True):
            scores[index] = round(score, 4)
    return scores
