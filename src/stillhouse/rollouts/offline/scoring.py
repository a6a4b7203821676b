"""The likelihood of whole responses under a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from stillhouse.core.host import to_device
from stillhouse.core.types import Response
from stillhouse.data.collate import collate, read_by_teacher
from stillhouse.models import head_of, hidden_rows

_ROWS = 1024
"""Response positions whose logits are held at a time."""


@torch.no_grad()
def mean_logprobs(
    model: nn.Module,
    responses: Sequence[Response],
    pad_id: int,
    vocab: int | None = None,
    batch_size: int = 32,
    as_teacher: bool = False,
) -> list[float]:
    """For each response 1/T sum_t log p(y_t | x, y_<t), in nats per token, T its tokens with the end token.

    Args:
        model: a causal language model; its mode is put back.
        responses: with at least one token each.
        pad_id: fills the right of shorter sequences.
        vocab: number of token ids that student and teacher share.
        batch_size: sequences in one forward pass.
        as_teacher: whether the model reads the teacher's prompts, where it has its own.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(responses)), key=lambda i: _length(responses[i]))
    found = [0.0] * len(responses)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = collate([responses[place] for place in places], pad_id).to(device)
        read = read_by_teacher(batch, pad_id) if as_teacher else batch
        hidden, labels, head = hidden_rows(model, read), batch.row_labels(), head_of(model, vocab)
        tokens = []
        for rows in torch.arange(len(labels)).split(_ROWS):
            logits = head.logits(hidden[rows]).float()
            tokens.append(logits.gather(1, labels[rows, None]).squeeze(1) - logits.logsumexp(-1))
        sums = torch.zeros(len(places), dtype=torch.float64, device=device)
        sums.index_add_(0, to_device(batch.row_sequences, device), torch.cat(tokens).double())
        for place, total in zip(places, sums.tolist(), strict=True):
            found[place] = total / batch.row_counts[places.index(place)]
    model.train(training)
    return found


def _length(response: Response) -> int:
    return len(response.prompt.token_ids) + len(response.token_ids)


def scorers(
    models: Mapping[str, nn.Module | None], pad_id: int, vocab: int, batch_size: int
) -> dict[str, Callable[[Sequence[Response]], list[float]]]:
    """`mean_logprobs` of each model, by its name; a model that is None is left out."""
    options: dict[str, Any] = {"pad_id": pad_id, "vocab": vocab, "batch_size": batch_size}
    return {
        name: partial(mean_logprobs, model, **options, as_teacher=name == "teacher")
        for name, model in models.items()
        if model is not None
    }
