"""Knowledge distillation in plain torch, on one screen: the oracle that the library matches step by step.

No Stillhouse trainer, no fused loss, no tricks: full logits, a mask, a mean over the response tokens of the
whole optimiser step. `tests/train/test_oracle.py` runs both and compares losses and weights.

    python examples/kd_loop.py STUDENT TEACHER ROWS.jsonl     # rows: {"prompt": ..., "response": ...}
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def encode(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its response with the end-of-sequence token."""
    prompt_ids = tokenizer(prompt).input_ids
    return prompt_ids, [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask, and the mask of positions that predict a response token (L-1 to L+R-2)."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), width), pad_id)
    attention = torch.zeros(len(rows), width, dtype=torch.long)
    predicts = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[index, :end] = torch.tensor(prompt + response)
        attention[index, :end] = 1
        predicts[index, len(prompt) - 1 : end - 1] = True
    return ids, attention, predicts


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) for each row, in nats."""
    log_p = teacher_logits.float().log_softmax(-1)
    log_q = student_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kd_losses(
    student: Any,
    teacher: Any,
    steps: list[list[tuple[list[int], list[int]]]],
    pad_id: int,
    lr: float,
    micro_batch: int,
    clip: float = 1.0,
) -> list[float]:
    """Train the student in place; one optimiser step for each list of rows. Returns the loss of each step."""
    optimiser = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    teacher.eval()
    student.train()
    losses = []
    for rows in steps:
        tokens = sum(len(response) for _, response in rows)
        total = 0.0
        for start in range(0, len(rows), micro_batch):
            ids, attention, predicts = pad(rows[start : start + micro_batch], pad_id)
            with torch.no_grad():
                teacher_logits = teacher(input_ids=ids, attention_mask=attention).logits[predicts]
            student_logits = student(input_ids=ids, attention_mask=attention).logits[predicts]
            loss = forward_kl(student_logits, teacher_logits).sum() / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
    return losses


def main(student_path: str, teacher_path: str, data: str) -> None:
    """Three passes over a file of prompts and responses."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    student = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.float32)
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    encoded = [encode(tokenizer, row["prompt"], row["response"]) for row in rows]
    random.seed(0)
    batch, steps = 32, []
    for _ in range(3):
        random.shuffle(encoded)
        steps += [encoded[start : start + batch] for start in range(0, len(encoded), batch)]
    pad_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    losses = kd_losses(student, teacher, steps, pad_id, lr=5e-4, micro_batch=8)
    for number, loss in enumerate(losses, start=1):
        print(f"step {number}: {loss:.4f} nats per token")
    student.save_pretrained("distilled")


if __name__ == "__main__":
    main(*sys.argv[1:4])
