"""The only place that divides: the weight of each token in the loss of one optimiser step.

An objective gives a value for each response token; the loss of the step is the weighted sum of these values
over all micro-batches and ranks. The weights hold every normalisation there is, so the gradient is the same
however the sequences are split, padded, accumulated or spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from stillhouse.core.batch import Batch
from stillhouse.core.types import SOURCES

Normalise = Literal["token", "sequence"]


def token_weights(
    micro_batches: Sequence[Batch],
    groups: Mapping[str, tuple[int, float]],
    normalise: Normalise,
    add_over_ranks: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> list[Tensor]:
    r"""The weight of every position, so that the loss is a plain weighted sum.

    With the response tokens of a group g of sources, loss weight w_g, on all ranks together:

    - "token": w_g / (number of tokens of g), the mean over tokens (DistiLLM, CSD, MiniLLM);
    - "sequence": w_g / (number of sequences of g x length of the token's sequence), the mean over
      sequences of the mean over tokens (DistiLLM-2).

    The loss is the sum over groups: L = sum_g w_g mean_g.

    Args:
        micro_batches: all micro-batches of the step on this rank.
        groups: source -> (number of its group, loss weight of the group). Sources under one objective share
            a group and so one mean; sources with objectives of their own have means of their own.
        normalise: which mean.
        add_over_ranks: adds a tensor of counts over all ranks.

    Returns:
        For each micro-batch [B, T]: zero where `response_mask` is false. The sum of all weights of a group
        over all ranks is w_g.
    """
    num_groups = 1 + max(group for group, _ in groups.values())
    counts = torch.zeros(num_groups, dtype=torch.float64)
    for batch in micro_batches:
        units = torch.tensor(batch.row_counts) if normalise == "token" else torch.ones(len(batch))
        counts.index_add_(0, _group_of(batch, groups), units.double() * _counted(batch))
    counts = add_over_ranks(counts)
    scale = torch.zeros(len(SOURCES), dtype=torch.float64)
    for source, (group, weight) in groups.items():
        scale[SOURCES.index(source)] = weight / counts[group].clamp(min=1)
    return [_spread(batch, scale, normalise) for batch in micro_batches]


def _group_of(batch: Batch, groups: Mapping[str, tuple[int, float]]) -> Tensor:
    return torch.tensor([groups[response.source][0] for response in batch.responses])


def _counted(batch: Batch) -> Tensor:
    """1 for each sequence of the step, 0 for a copy that fills it up."""
    return torch.tensor([float(not response.repeated) for response in batch.responses], dtype=torch.float64)


def _spread(batch: Batch, scale: Tensor, normalise: Normalise) -> Tensor:
    per_token = scale[[SOURCES.index(response.source) for response in batch.responses]] * _counted(batch)
    if normalise == "sequence":
        per_token = per_token / batch.response_mask.sum(1)
    return torch.where(batch.response_mask, per_token[:, None], 0.0).float()
