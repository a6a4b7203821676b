"""Reward models: the body of a causal model with a head of one number, as transformers has them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stillhouse.errors import ModelError
from stillhouse.models.paths import model_files
from stillhouse.models.tokenizers import tokenizer_difference


def load_reward_model(path: str, tokenizer: Any = None, start: bool = False) -> nn.Module:
    """A reward model from a folder, ready to score.

    Args:
        path: a folder or a name on the hub; also a run folder.
        tokenizer: the student's, whose token ids it is to read; None: not compared.
        start: take a causal language model, whose head is replaced by a new one.

    Raises:
        ModelError: there is no such model, its tokenizer is another one, or its head was not saved.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = model_files(path).model
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would report the missing head, of which we speak ourselves
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, output_loading_info=True
        )
        own = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{path}: no reward model could be read from there. ({error})") from error
    finally:
        logger.setLevel(level)
    if not start and (missing := sorted(loaded["missing_keys"])):
        raise ModelError(
            f"{path}: is no reward model: it has no {missing[0]}, the head that gives the number. Train one "
            "with stillhouse reward."
        )
    if tokenizer is not None and (found := tokenizer_difference(tokenizer, own)) is not None:
        raise ModelError(
            f"{path}: the reward model has another tokenizer than the student: {found}. Train one from a "
            "model with the student's."
        )
    model.config.pad_token_id = own.pad_token_id if own.pad_token_id is not None else own.eos_token_id
    return model.eval()


@torch.no_grad()
def rewards(model: nn.Module, sequences: Sequence[Sequence[int]], batch_size: int = 32) -> list[float]:
    """The number that a reward model gives each sequence, prompt and response together.

    Args:
        model: what `load_reward_model` gave.
        sequences: token ids without padding.
        batch_size: sequences in one forward pass.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    pad = int(config.pad_token_id)
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
    found = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        width = max(len(sequences[place]) for place in places)
        ids = torch.full((len(places), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            known = torch.tensor(sequences[place], dtype=torch.int64)
            ids[row, : len(known)], mask[row, : len(known)] = known, 1
        scores = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0]
        for place, score in zip(places, scores.float().tolist(), strict=True):
            found[place] = score
    return found
