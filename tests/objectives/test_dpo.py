"""DPO and its variants have the value and the gradient of TRL's DPOTrainer on the same pairs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.recipe_steps import prepared
from tests.small_runs import STUDENT, TEACHER, write_data

from stillhouse.core.types import Prompt
from stillhouse.data.collate import collate
from stillhouse.runs.build import Parts

WITHOUT_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def of_trl(parts: Parts, folder: Path, **options: Any) -> tuple[float, list[torch.Tensor]]:
    """Value and gradients of TRL's loss on the first four pairs."""
    from trl import DPOConfig, DPOTrainer

    pairs = [pair for prompt in parts.data.train[:4] if (pair := Prompt.preference_pair(prompt))]
    batch = collate([pair[side] for side in (0, 1) for pair in pairs], parts.facts.pad_id)
    completion = torch.zeros_like(batch.input_ids)
    completion[:, 1:] = batch.response_mask[:, :-1].long()  # ours marks the positions that predict
    student = copy.deepcopy(parts.student)
    trainer = DPOTrainer(
        model=student,
        ref_model=parts.teachers["reference"],
        args=DPOConfig(str(folder), max_length=None, use_cpu=True, report_to=[], **options),
        train_dataset=Dataset.from_dict({"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]}),
        processing_class=parts.tokenizer,
    )
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": completion,
    }
    loss = trainer.compute_loss(student, inputs)
    loss.backward()
    return loss.item(), [parameter.grad for parameter in student.parameters()]


@pytest.mark.parametrize(
    ("loss", "smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0)],
)
def test_value_and_gradient_are_those_of_trl(tmp_path: Path, loss: str, smoothing: float) -> None:
    write_data(tmp_path, rows=12)
    objective = {"kind": "dpo", "beta": 0.3, "loss": loss, "label_smoothing": smoothing}
    start = {"tokenizer": TEACHER, "from_config": {**STUDENT, **WITHOUT_DROPOUT}}
    parts, step, made = prepared(tmp_path, "dpo", objective=objective, student=start)
    weights = {loss: 1.0}
    if loss == "sigmoid":  # TRL 1.16 smooths `robust` alone; from both follows conservative DPO
        weights = {"sigmoid": 2 * (1 - smoothing), "robust": 2 * smoothing - 1}
    trl = {"loss_type": list(weights), "loss_weights": list(weights.values())}
    found = of_trl(parts, tmp_path / "trl", beta=0.3, label_smoothing=smoothing, **trl)
    losses = [step.loss(parts.student, one) for one in made.micro_batches]
    sum(one.loss for one in losses).backward()
    assert len(losses) == 2
    assert sum(one.loss.item() for one in losses) == pytest.approx(found[0], rel=1e-4)
    for ours, theirs in zip(parts.student.parameters(), found[1], strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=2e-3, atol=2e-5)
