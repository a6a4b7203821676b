"""How much a model's responses differ from each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean

from stillhouse.errors import DataError, EnvironmentFault

ORDER = 4
"""The longest n-grams of BLEU."""


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Share (0 to 1) of n-grams, over all responses together, that are different from each other; higher is
    more diverse.

    distinct-n = |set of n-grams| / number of n-grams. Responses shorter than n hold no n-gram; 0 where no
    response holds one. The number falls as more text is counted: compare sets of the same size only.

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
    """Mean BLEU (0 to 100) of each response against all others as its references; lower is more diverse.

    The number depends on how many responses there are: each is a reference of all others. So at most `limit`
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
    words = BLEU().tokenizer
    seen = [extract_all_word_ngrams(words(text.rstrip()), 1, ORDER) for text in chosen]
    # For each n-gram the two largest counts: the second one is what the others of the largest one's owner
    # have. So each text is read once, and the numbers are those of `sentence_score` with all others.
    largest: dict[tuple[str, ...], tuple[int, int]] = {}
    for grams, _ in seen:
        for gram, times in grams.items():
            first, second = largest.get(gram, (0, 0))
            largest[gram] = (times, first) if times > first else (first, max(second, times))
    scores = []
    for index, (grams, length) in enumerate(seen):
        correct, total = [0] * ORDER, [0] * ORDER
        for gram, times in grams.items():
            first, second = largest[gram]
            total[len(gram) - 1] += times
            correct[len(gram) - 1] += min(times, second if times == first else first)
        lengths = [other for place, (_, other) in enumerate(seen) if place != index]
        nearest = min(lengths, key=lambda other: (abs(other - length), other))
        scores.append(BLEU.compute_bleu(correct, total, length, nearest, "exp", effective_order=True).score)
    return fmean(scores)
