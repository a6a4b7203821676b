"""How long the responses are, and whether they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median

from stillhouse.errors import DataError


@dataclass(frozen=True, slots=True)
class Lengths:
    """Length statistics of a set of responses.

    Example: `Lengths(mean_length=41.5, median_length=40.0, max_length=128, finished=0.97)`
    """

    mean_length: float
    """Mean number of response tokens, end-of-sequence token included."""
    median_length: float
    """Median number of response tokens."""
    max_length: int
    """Longest response in tokens."""
    finished: float
    """Share (0 to 1) of responses that ended with the end-of-sequence token instead of the length limit."""

    def as_metrics(self) -> dict[str, float]:
        """The four numbers by name."""
        return asdict(self)


def lengths(tokens: Sequence[int], finished: Sequence[bool]) -> Lengths:
    """Length statistics from the number of tokens of each response and whether it ended by itself.

    Raises:
        DataError: no rows, or lists of different length.
    """
    if not tokens:
        raise DataError("lengths: there are no responses to count.")
    if len(tokens) != len(finished):
        raise DataError(f"lengths: {len(tokens)} token counts but {len(finished)} finished flags.")
    return Lengths(
        mean_length=fmean(tokens),
        median_length=float(median(tokens)),
        max_length=max(tokens),
        finished=fmean(bool(flag) for flag in finished),
    )
