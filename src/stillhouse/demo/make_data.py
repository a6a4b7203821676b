"""Derives the demo's data from the cleaned E2E NLG files: one row for each meaning representation.

    python -m stillhouse.demo.make_data FOLDER

`FOLDER` holds e2e_nlg_train.jsonl, e2e_nlg_dev.jsonl and e2e_nlg_eval.jsonl with the fields instruction,
input, and output or outputs. The instruction is the same in all rows and left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from stillhouse.files import write_jsonl

HERE = Path(__file__).parent / "data"
SETS = ("train", "dev", "eval")


def collapsed(lines: list[str]) -> list[dict[str, object]]:
    """One `{prompt, outputs}` for each meaning representation, with all its texts in the order of the source.

    Rows are ordered by the SHA-256 of the prompt: the order is fixed, and the first n rows are a fair sample.
    """
    outputs: dict[str, list[str]] = {}
    for line in lines:
        row = json.loads(line)
        outputs.setdefault(row["input"], []).extend(row.get("outputs") or [row["output"]])
    ordered = sorted(outputs, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    return [{"prompt": prompt, "outputs": outputs[prompt]} for prompt in ordered]


def main() -> None:
    """Write the three files anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in SETS:
        lines = (folder / f"e2e_nlg_{name}.jsonl").read_text(encoding="utf-8").splitlines()
        write_jsonl(HERE / f"{name}.jsonl", collapsed(lines))


if __name__ == "__main__":
    main()
