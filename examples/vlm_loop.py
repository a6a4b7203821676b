"""Distillation of vision-language models in plain torch and transformers: what the library matches.

No padding, no batches: each row goes through each model alone, as that model's own processor gives it, and
the logits that predict the response are compared. Student and teacher may have different vision towers and
numbers of image tokens; they share the tokenizer. `tests/train/test_vlm_loop.py` runs this beside the library
and compares losses and gradients.

    python examples/vlm_loop.py STUDENT TEACHER ROWS.jsonl

Rows: {"prompt": "<image>What is it?", "images": ["cat.png"], "response": "A cat."}, with or without images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor


def encode(processor: Any, text: str, images: list[Any], response_ids: list[int]) -> dict[str, Tensor]:
    """What a model is called with: the prompt as its processor expands it, and the response behind.

    Args:
        processor: the model's own.
        text: the prompt, with the processor's image token where an image is.
        images: as they follow in the text.
        response_ids: token ids, the end-of-sequence token last.
    """
    shown = {"images": [images]} if images else {}
    inputs = dict(processor(text=[text], return_tensors="pt", **shown))
    response = torch.tensor([response_ids])
    behind = {
        "input_ids": response,
        "attention_mask": torch.ones_like(response),
        "mm_token_type_ids": torch.zeros_like(response),  # the response is text
    }
    for name, values in behind.items():
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], values.to(inputs[name].dtype)], dim=1)
    return inputs


def response_logits(model: Any, inputs: dict[str, Tensor], count: int) -> Tensor:
    """[R, V] at the positions that predict the R response tokens, the last of the sequence."""
    return model(**inputs).logits[0, -count - 1 : -1].float()


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) for each row, in nats."""
    log_p = teacher_logits.log_softmax(-1)
    log_q = student_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def accumulate(student: Any, teacher: Any, rows: list[tuple[dict, dict, int]]) -> float:
    """Add the gradient of the rows of one optimiser step; the mean KL of their response tokens.

    Args:
        student: in training.
        teacher: in evaluation.
        rows: of each what the student and what the teacher is called with, and the number of response tokens.
    """
    tokens = sum(count for _, _, count in rows)
    total = 0.0
    for for_student, for_teacher, count in rows:
        with torch.no_grad():
            wanted = response_logits(teacher, for_teacher, count)
        loss = forward_kl(response_logits(student, for_student, count), wanted).sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def image_text(processor: Any) -> str:
    """An image in a prompt: the image token, which Qwen-VL's family puts between two marks."""
    marked = (
        "<|vision_start|>" in processor.tokenizer.get_vocab() and processor.image_token == "<|image_pad|>"
    )
    return "<|vision_start|><|image_pad|><|vision_end|>" if marked else processor.image_token


def main(student_path: str, teacher_path: str, data: str) -> None:
    """Three passes over a file of rows, eight rows to a step."""
    processors = [AutoProcessor.from_pretrained(path) for path in (student_path, teacher_path)]
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        for path in (student_path, teacher_path)
    )
    tokenizer = processors[0].tokenizer
    rows = []
    for line in Path(data).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        images = [Image.open(Path(data).parent / name).convert("RGB") for name in row.get("images", ())]
        ids = [*tokenizer(row["response"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        texts = [row["prompt"].replace("<image>", image_text(one)) for one in processors]
        ours, theirs = (encode(one, text, images, ids) for one, text in zip(processors, texts, strict=True))
        rows.append((ours, theirs, len(ids)))
    optimiser = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.0)
    teacher.eval()
    student.train()
    for start in [*range(0, len(rows), 8)] * 3:
        loss = accumulate(student, teacher, rows[start : start + 8])
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        print(f"{loss:.4f} nats per token")
    student.save_pretrained("distilled")
    processors[0].save_pretrained("distilled")


if __name__ == "__main__":
    main(*sys.argv[1:4])
