"""BLEU and chrF of a set of texts, as sacrebleu computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillhouse.errors import DataError, EnvironmentFault


def corpus_bleu(responses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 (0 to 100) of all responses together: n-gram counts are summed before they are divided.

    Source: Papineni et al. (2002) as sacrebleu computes it (Post 2018): 13a tokenizer, exponential smoothing,
    the reference nearest in length for the brevity penalty.

    Args:
        responses: what the model wrote, one text a row.
        references: the right answers, one or more a row; rows may have different numbers of them.

    Raises:
        DataError: no rows, or a row without a reference.
        EnvironmentFault: sacrebleu is not installed.
    """
    return _corpus("BLEU", responses, references)


def corpus_chrf(responses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 (0 to 100) of all responses together: F-score of character n-grams up to 6, recall counted twice.

    Source: Popović (2015) as sacrebleu computes it. Arguments and errors as `corpus_bleu`.
    """
    return _corpus("CHRF", responses, references)


def _corpus(name: str, responses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise EnvironmentFault(
            f"{name} needs the package sacrebleu. Install it with: pip install 'stillhouse[eval]'"
        ) from error
    if not responses or not all(references):
        raise DataError(f"{name}: needs rows, each with at least one reference.")
    measure: Any = getattr(metrics, name)()
    most = max(len(texts) for texts in references)
    # One list for the first reference of each row, one for the second, ...; None where a row has fewer.
    columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return float(measure.corpus_score(list(responses), columns).score)
