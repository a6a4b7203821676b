"""GKD as TRL trains it, on the models, prompts and steps of one of our runs; a peer for distillm_speed.py.

TRL generates with transformers' `generate`, keeps the logits of the whole sequence of both models, and draws
anew for each micro-batch whether it is on-policy. The token ids are ours; optimiser, precision and schedule
those of the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Collator:
    """Token ids of our prompts as GKDTrainer takes them: with responses, and alone, padded on the left."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch."""
        import torch

        whole = [[*row["prompt_ids"], *row["response_ids"]] for row in rows]
        width, wide = max(map(len, whole)), max(len(row["prompt_ids"]) for row in rows)

        def padded(ids: list[list[int]], length: int, fill: int, left: bool = False) -> torch.Tensor:
            return torch.tensor(
                [[fill] * (length - len(r)) + r if left else r + [fill] * (length - len(r)) for r in ids]
            )

        prompts = [list(row["prompt_ids"]) for row in rows]
        labels = [[-100] * len(row["prompt_ids"]) + list(row["response_ids"]) for row in rows]
        return {
            "input_ids": padded(whole, width, self.pad),
            "attention_mask": padded([[1] * len(r) for r in whole], width, 0),
            "labels": padded(labels, width, -100),
            "prompts": padded(prompts, wide, self.pad, left=True),
            "prompt_attention_mask": padded([[1] * len(r) for r in prompts], wide, 0, left=True),
        }


def count_texts(model: Any) -> dict[str, int]:
    """Count the texts that `model.generate` writes from now on."""
    counted = {"texts": 0}
    generate = model.generate

    def counting(*arguments: Any, **options: Any) -> Any:
        written = generate(*arguments, **options)
        counted["texts"] += len(getattr(written, "sequences", written))
        return written

    model.generate = counting
    return counted


def trainer_of(parts: Any, run: Any, folder: Path, *, use_cpu: bool = True, **options: Any) -> Any:
    """TRL's trainer over loaded parts, with the settings and micro-batches of a run of ours."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    parts.student.generation_config.eos_token_id = list(parts.facts.eos_ids)
    rows = [
        {"prompt_ids": list(p.token_ids), "response_ids": list(p.response_ids or ())}
        for p in parts.data.train
    ]
    micro = run.train.micro_batch_size
    settings = GKDConfig(
        output_dir=str(folder), max_steps=run.train.max_steps, learning_rate=run.train.lr,
        per_device_train_batch_size=micro, gradient_accumulation_steps=run.train.batch_size // micro,
        lr_scheduler_type=run.train.schedule, warmup_steps=run.train.warmup,
        weight_decay=run.train.weight_decay, max_grad_norm=run.train.clip,
        bf16=run.train.precision == "bfloat16", seed=run.train.seed, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=use_cpu, dataloader_pin_memory=not use_cpu, gradient_checkpointing=False,
        logging_steps=run.train.log_every, temperature=1.0, max_new_tokens=run.data.max_response, **options,
    )  # fmt: skip
    return GKDTrainer(
        model=parts.student, teacher_model=parts.teacher, args=settings, processing_class=parts.tokenizer,
        train_dataset=Dataset.from_list(rows), data_collator=Collator(parts.facts.pad_id),
    )  # fmt: skip


def train(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train with TRL what a configuration of ours for `gkd` says; seconds and held-out ROUGE-L.

    A folder that holds the result is read instead.
    """
    folder = Path(config["output"]["folder"])
    result = folder / "result.json"
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    from stillhouse.runs.build import assemble
    from stillhouse.runs.evaluation import evaluate_prompts, held_out_prompts
    from stillhouse.runs.resolve import resolve

    run = resolve(config, {}).config
    parts = assemble(run)
    shares = {"lmbda": run.responses.student_share, "beta": run.objective.teacher_weight}
    trainer = trainer_of(parts, run, folder, **shares)
    counted = count_texts(parts.student)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    share = counted["texts"] / (run.train.max_steps * run.train.batch_size)
    metrics, _, _ = evaluate_prompts(
        parts, parts.student, held_out_prompts(run, parts.data, parts.tokenizer), title=None
    )
    measured = {
        "seconds": seconds, "rouge_l": metrics["rouge_l"], "mean_length": metrics["mean_length"],
        "student_share": share,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(measured), encoding="utf-8")
    return measured
