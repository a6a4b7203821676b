"""The recipe `dpo` with the steps of TRL's DPOTrainer: same models, token ids, order and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback
from trl import DPOConfig, DPOTrainer

from stillhouse.core.types import Response
from stillhouse.data.collate import collate
from stillhouse.runs.build import assemble
from stillhouse.runs.evaluation import evaluate_system, held_out_prompts
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.resolve import Resolved
from stillhouse.runs.training_arguments import training_arguments


class TokenPairs(DPOTrainer):
    """DPOTrainer on token ids: nothing is rendered or tokenised again."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None."""


class Collator:
    """Positions in the list of pairs to TRL's batch: the chosen responses first, then the rejected ones."""

    def __init__(self, pairs: Sequence[tuple[Response, ...]], pad_id: int) -> None:
        self._pairs, self._pad_id = pairs, pad_id

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        pairs = [self._pairs[row["pair"]] for row in rows]
        batch = collate([pair[side] for side in (0, 1) for pair in pairs], self._pad_id)
        completion = torch.zeros_like(batch.input_ids)
        completion[:, 1:] = batch.response_mask[:, :-1].long()  # ours marks the positions that predict
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "completion_mask": completion,
        }


def run_by_trl(resolved: Resolved, folder: Path) -> None:
    """Train a run of the recipe `dpo` by TRL, and evaluate it as a run is."""
    config = resolved.config
    parts = assemble(config)
    pairs = [pair for prompt in parts.data.train if (pair := prompt.preference_pair()) is not None]
    more = {
        "beta": config.objective.beta,
        "loss_type": [config.objective.loss],
        "max_length": None,
        "disable_dropout": True,
        "gradient_checkpointing": False,
        "router_aux_loss_coef": 0.0,
    }
    trainer = TokenPairs(
        model=parts.student,
        ref_model=parts.teachers["reference"],
        args=training_arguments(config, folder / "trl", DPOConfig, more),
        train_dataset=Dataset.from_dict({"pair": list(range(len(pairs)))}),
        data_collator=Collator(pairs, parts.facts.pad_id),
        processing_class=parts.tokenizer,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    questions = held_out_prompts(config, parts.data, parts.tokenizer)
    place = RunFolder(folder)
    evaluate_system(parts, questions, place, "student after", parts.student.eval())
    parts.student.save_pretrained(folder / "student")
