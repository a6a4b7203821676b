"""The two responses of a pair, of which one is preferred, and the difference of what they sum to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.core.host import Ints, to_device
from stillhouse.core.rows import Rows, sequence_means
from stillhouse.core.types import SOURCES

PREFERRED = {"chosen": 1.0, "teacher": 1.0, "rejected": -1.0, "student": -1.0}
"""By source: whether a response is preferred (1) or the other one (-1)."""
_SIDES = [[SOURCES.index(source) for source, sign in PREFERRED.items() if sign == one] for one in (1.0, -1.0)]
"""The sources of preferred responses, and of the others."""


def pair_gaps(values: Tensor, rows: Rows, name: str, mean: bool) -> tuple[Tensor, Tensor]:
    """What the preferred response of each pair has more than the other one.

    Args:
        values: of each row, [N].
        rows: with sequences, sources and pairs.
        name: of the objective, for the message.
        mean: compare means over the tokens of a response instead of sums.

    Returns:
        The gap of each pair [P], and the pair of each row [N].

    Raises:
        ValueError: a pair does not have one response of either side.
    """
    ids, sources, pairs = rows.sequence_ids, rows.sources, rows.pair_ids
    assert ids is not None
    assert sources is not None
    assert pairs is not None
    of_sequence = sequence_means(values, ids)
    if not mean:
        of_sequence = of_sequence * to_device(np.bincount(ids), values.device)
    sequences, first = np.unique(ids, return_index=True)
    prompts, pair = np.unique(pairs[first], return_inverse=True)
    preferred, other = (
        _one_of_each_pair(sequences, pair, np.isin(sources[first], codes), len(prompts), name)
        for codes in _SIDES
    )
    gaps = of_sequence[to_device(preferred, values.device)] - of_sequence[to_device(other, values.device)]
    return gaps, to_device(pair[np.searchsorted(sequences, ids)], values.device)


def _one_of_each_pair(sequences: Ints, pair: Ints, written: NDArray[np.bool_], count: int, name: str) -> Ints:
    """The sequence of each pair, 0 to `count` - 1, that is among those `written`."""
    index = pair[written]
    if len(index) != count or len(np.unique(index)) != count:
        raise ValueError(
            f"{name} needs exactly one teacher-written (or chosen) and one student-written (or rejected) "
            "response of each pair in the batch; use responses.kind: pairs or preference_pairs"
        )
    return sequences[written][np.argsort(index)]
