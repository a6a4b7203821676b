"""Metrics of generated text: agreement with references, diversity and length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean, median
from typing import Any, Literal

from stillhouse.errors import DataError, EnvironmentFault

BLEU_ORDER = 4
"""The longest n-grams of BLEU."""


def rouge_l(responses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L F-measure (0 to 100) of each response, Porter stemmer, best over its references.

    With L = length of the longest common subsequence of the stemmed words, P = L / words in the response and
    R = L / words in the reference, the score is 2 P R / (P + R), the best over the references, times 100.
    Words are what the rouge-score package makes of a text (lower case, Latin letters and digits only), so
    texts in other scripts score 0.

    Source: Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", as the `rouge-score`
    package computes it.

    Args:
        responses: generated texts.
        references: one or more for each response.

    Raises:
        DataError: no responses, lists of different length, or a response without a reference.
    """
    if not responses:
        raise DataError("ROUGE-L: there are no responses to score.")
    if len(responses) != len(references):
        raise DataError(f"ROUGE-L: {len(responses)} responses but references for {len(references)} rows.")
    missing = next((index for index, texts in enumerate(references) if not texts), None)
    if missing is not None:
        raise DataError(
            f"ROUGE-L: row {missing + 1} has no reference. Give each row a reference or leave such rows out."
        )
    from rouge_score.rouge_scorer import RougeScorer  # loads nltk, which takes a second

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        100.0 * scorer.score_multi(list(texts), response)["rougeL"].fmeasure
        for response, texts in zip(responses, references, strict=True)
    ]


def rouge_l_if_referenced(
    responses: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float | None]:
    """`rouge_l` of each response to four digits; None for responses without a reference."""
    referenced = [index for index, texts in enumerate(references) if texts]
    scores: list[float | None] = [None] * len(responses)
    if referenced:
        found = rouge_l([responses[i] for i in referenced], [references[i] for i in referenced])
        for index, score in zip(referenced, found, strict=True):
            scores[index] = round(score, 4)
    return scores


def corpus_bleu(responses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 (0 to 100) of a corpus: n-gram counts are summed over all responses before they are divided.

    Source: Papineni et al. (2002) as sacrebleu computes it (Post 2018): 13a tokenizer, exponential smoothing,
    the reference nearest in length for the brevity penalty.

    Args:
        responses: generated texts.
        references: one or more for each response; their number may differ between responses.

    Raises:
        DataError: no responses, or a response without a reference.
        EnvironmentFault: sacrebleu is not installed.
    """
    return float(_sacrebleu("BLEU", responses, references).score)


def corpus_chrf(responses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 (0 to 100) of a corpus: F-score of character n-grams up to 6, recall weighted twice.

    Source: Popović (2015) as sacrebleu computes it. Arguments and errors as `corpus_bleu`.
    """
    return float(_sacrebleu("CHRF", responses, references).score)


def corpus_interval(
    name: Literal["bleu", "chrf"], responses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """The 95 % interval of corpus BLEU or chrF: sacrebleu's bootstrap over responses, 1,000 draws with its
    own seed."""
    score = _sacrebleu(name.upper(), responses, references, draws=1000)
    return score.score - score._ci, score.score + score._ci


def _sacrebleu(
    name: str, responses: Sequence[str], references: Sequence[Sequence[str]], draws: int = 1
) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise EnvironmentFault(
            f"{name} needs the package sacrebleu. Install it with: pip install 'stillhouse[eval]'"
        ) from error
    if not responses or not all(references):
        raise DataError(f"{name}: needs responses, each with at least one reference.")
    metric: Any = getattr(metrics, name)()
    count = max(len(texts) for texts in references)
    # One list with the first reference of each response, one with the second, ...; None where there is none.
    columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(count)]
    return metric.corpus_score(list(responses), columns, n_bootstrap=draws)


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Share (0 to 1) of distinct n-grams over all responses together; higher is more diverse.

    distinct-n = |set of n-grams| / number of n-grams. Responses shorter than n have no n-gram; 0 where no
    response has one. The value falls as more text is counted: compare sets of the same size only.

    Source: Li et al. (2016), "A Diversity-Promoting Objective Function for Neural Conversation Models",
    section 5.

    Args:
        responses: each a sequence of words or token ids, for example `text.split()`.
        n: length of the n-grams.
    """
    if n < 1:
        raise ValueError(f"distinct_n: n is {n}; it must be 1 or more")
    grams = [tuple(row[start : start + n]) for row in responses for start in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(responses: Sequence[str], limit: int = 200) -> float:
    """Mean BLEU (0 to 100) of each response with all others as its references; lower is more diverse.

    The value depends on the number of responses, since each is a reference of all others. So at most `limit`
    of them, evenly spaced, are compared.

    Source: Zhu et al. (2018), "Texygen", section 3.2; BLEU-4 as sacrebleu's `sentence_bleu` computes it (13a
    tokenizer, exponential smoothing).

    Raises:
        DataError: fewer than two responses.
        EnvironmentFault: sacrebleu is not installed.
    """
    if len(responses) < 2:
        raise DataError(f"self-BLEU: needs two responses or more, got {len(responses)}.")
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.helpers import extract_all_word_ngrams
    except ImportError as error:
        raise EnvironmentFault(
            "self-BLEU needs the package sacrebleu. Install it with: pip install 'stillhouse[eval]'"
        ) from error
    count = min(len(responses), max(2, limit))
    chosen = [responses[index * len(responses) // count] for index in range(count)]
    tokenize = BLEU().tokenizer
    counted = [extract_all_word_ngrams(tokenize(text.rstrip()), 1, BLEU_ORDER) for text in chosen]
    # For each n-gram its two largest counts: the maximum over all other responses is the first, or the second
    # for the response that has the first. So each text is counted once instead of once for each other text.
    largest: dict[tuple[str, ...], tuple[int, int]] = {}
    for grams, _ in counted:
        for gram, times in grams.items():
            first, second = largest.get(gram, (0, 0))
            largest[gram] = (times, first) if times > first else (first, max(second, times))
    scores = []
    for index, (grams, length) in enumerate(counted):
        correct, total = [0] * BLEU_ORDER, [0] * BLEU_ORDER
        for gram, times in grams.items():
            first, second = largest[gram]
            total[len(gram) - 1] += times
            correct[len(gram) - 1] += min(times, second if times == first else first)
        others = [other for place, (_, other) in enumerate(counted) if place != index]
        nearest = min(others, key=lambda other: (abs(other - length), other))
        scores.append(BLEU.compute_bleu(correct, total, length, nearest, "exp", effective_order=True).score)
    return fmean(scores)


def length_statistics(tokens: Sequence[int], finished: Sequence[bool]) -> dict[str, float]:
    """How long responses are and whether they terminate.

    Args:
        tokens: number of tokens of each response, end-of-sequence token included.
        finished: whether each ended with the end-of-sequence token rather than at the length limit.

    Returns:
        `mean_length`, `median_length` and `max_length` in tokens; `finished`, a share of 0 to 1.

    Raises:
        DataError: no responses, or lists of different length.
    """
    if not tokens:
        raise DataError("lengths: there are no responses to count.")
    if len(tokens) != len(finished):
        raise DataError(f"lengths: {len(tokens)} token counts but {len(finished)} finished flags.")
    return {
        "mean_length": fmean(tokens),
        "median_length": float(median(tokens)),
        "max_length": max(tokens),
        "finished": fmean(bool(flag) for flag in finished),
    }
