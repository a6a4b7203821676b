"""A script for TRL's GKDTrainer. With the one import changed, Stillhouse trains the same:

from stillhouse.trl import GKDConfig, GKDTrainer

python examples/trl_gkd.py STUDENT TEACHER ROWS.jsonl     # rows: {"messages": [...]}
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

student_path, teacher_path, rows = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(teacher_path)
trainer = GKDTrainer(
    model=AutoModelForCausalLM.from_pretrained(student_path, dtype="float32"),
    teacher_model=AutoModelForCausalLM.from_pretrained(teacher_path, dtype="float32"),
    args=GKDConfig(
        output_dir="gkd",
        lmbda=0.0,
        beta=0.5,
        max_length=96,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=False,
        seed=3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    ),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
