"""A student, a teacher and rows as a script has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.files import locate

DEMO = "package:stillhouse/demo/"
CHAT = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}"
    "{{ '\n' if m['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `student` and `teacher` with a chat template, and `rows.jsonl` with messages."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(locate(f"{DEMO}teacher"))
    tokenizer.chat_template = CHAT
    from transformers import AutoConfig

    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            **TINY,
            vocab_size=len(tokenizer),
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
            max_position_embeddings=256,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = locate(f"{DEMO}data/train.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [json.loads(line) for line in lines]
    written = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["outputs"][0]},
            ]
        }
        for row in rows
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, written)) + "\n", encoding="utf-8")
    return folder
