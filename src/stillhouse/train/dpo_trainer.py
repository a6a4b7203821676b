"""TRL's DPOTrainer over pairs that are token ids already.

It is imported where a stage asks for it, because TRL is an extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer

from stillhouse.core.types import Prompt, Response
from stillhouse.data.collate import collate
from stillhouse.train.preference.base import StageTraining
from stillhouse.train.trainer import CheckpointLoading


class TokenPairTrainer(CheckpointLoading, DPOTrainer):
    """DPOTrainer on the token ids of `Prompt.preference_pair`: nothing is rendered or tokenised again."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """The rows as they are."""
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: the run folder writes the student's card."""


class PairCollator:
    """Positions in the list of pairs to TRL's batch: the chosen responses first, then the rejected ones."""

    def __init__(self, pairs: Sequence[tuple[Response, Response]], pad_id: int) -> None:
        self._pairs = pairs
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        """[2 P, T] `input_ids` and `attention_mask`, and `completion_mask`: 1 for each token trained on."""
        pairs = [self._pairs[row["pair"]] for row in rows]
        batch = collate([pair[side] for side in (0, 1) for pair in pairs], self._pad_id)
        completion = torch.zeros_like(batch.input_ids)
        completion[:, 1:] = batch.response_mask[:, :-1].long()  # it marks the positions that predict them
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "completion_mask": completion,
        }


def dpo_trainer(training: StageTraining) -> TokenPairTrainer:
    """The trainer of a stage, with its reference and callbacks."""
    pairs = _pairs(training.prompts)
    return TokenPairTrainer(
        model=training.student,
        ref_model=training.reference,
        args=training.arguments,
        train_dataset=Dataset.from_dict({"pair": list(range(len(pairs)))}),
        data_collator=PairCollator(pairs, training.pad_id),
        processing_class=training.tokenizer,
        callbacks=list(training.callbacks),
    )


def _pairs(prompts: Sequence[Prompt]) -> list[tuple[Response, Response]]:
    found = (prompt.preference_pair() for prompt in prompts)
    return [pair for pair in found if pair is not None]
