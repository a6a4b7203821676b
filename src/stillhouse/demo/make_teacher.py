"""Trains the demonstration's tokenizer and teacher and puts them into the package: `make demo-teacher`.

About fifteen minutes on one core. The weights are stored as bfloat16, which halves the package.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
TEACHER = HERE / "teacher"
VOCABULARY = 1024


def train_tokenizer(rows: list[dict[str, object]], folder: Path) -> None:
    """A byte-level BPE tokenizer over prompts and texts, with tokens for padding and end of sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [str(row["prompt"]) for row in rows]
    for row in rows:
        outputs = row["outputs"]
        assert isinstance(outputs, list)
        texts += map(str, outputs)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    wrapped.save_pretrained(folder)


def main(folder: Path) -> None:
    """Train both; the run's files go into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    from stillhouse.runs.execute import execute
    from stillhouse.runs.resolve import resolve

    data = (HERE / "data" / "train.jsonl").read_text(encoding="utf-8")
    train_tokenizer([json.loads(line) for line in data.splitlines()], TEACHER)
    result = execute(resolve(HERE / "teacher.yaml", {"output.folder": str(folder)}))
    model = AutoModelForCausalLM.from_pretrained(result.folder / "student", dtype=torch.bfloat16)
    model.save_pretrained(TEACHER)
    shutil.copy(HERE / "teacher.yaml", TEACHER / "recipe.yaml")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-teacher"))
