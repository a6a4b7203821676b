"""How many rows head and embedding have: those of the tokenizer, or as many as another model."""

from __future__ import annotations

import copy
from typing import Any

import torch


def without_padding_rows(model: Any, vocab: int) -> Any:
    """The model without rows of head and embedding beyond the tokenizer's ids; a copy if there are some.

    No loss ever reaches them: of a student that started from random weights they would keep a share of the
    mass wherever others sample from all rows.
    """
    if model.get_output_embeddings().weight.shape[0] <= vocab:
        return model
    return with_rows(model, vocab)


@torch.no_grad()
def with_rows(model: Any, rows: int) -> Any:
    """The model with so many rows in head and embedding, a copy if it has another number.

    Rows that are new are zero: their logits are 0, far below those of any token that is likely. A target
    model rejects them where a draft model proposes one.
    """
    had = model.get_output_embeddings().weight.shape[0]
    if had == rows:
        return model
    made = copy.deepcopy(model)
    made.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (made.get_input_embeddings(), made.get_output_embeddings()):
        layer.weight[had:] = 0
    return made
