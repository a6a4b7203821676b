"""Self-distillation with the row's response in the teacher's prompt, against SFT on the same rows.

E2E NLG, from the demonstration's data. A small Llama is trained from random weights on descriptions of pubs
and restaurants, half of them with another reference in the prompt as an example, so that it can use one. Then
it learns coffee shops, which it has not seen, from rows with one reference each: by SFT, or by
self-distillation on its own text. ROUGE-L over held-out coffee shops says what was learnt, over held-out pubs
and restaurants what was kept. Steps, batch and learning rate are equal; the start is the same for all.

    nice -n 15 python benchmarks/self_distillation.py --output benchmarks/results/self_distillation.json
    python benchmarks/self_distillation.py --small
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _result import result, save

import stillhouse
from stillhouse.files import locate, write_jsonl

DEMO = "package:stillhouse/demo"
CONTEXT = "{prompt}\nExample: {response}"
"""The words of the hint, as the start was trained to read it."""
NEW = "eatType[coffee shop]"
OWN = {"kind": "student"}
ON_POLICY = {"kind": "on_policy", "sampling": {"temperature": 0.7}}
METHODS: dict[str, dict[str, Any]] = {
    "SFT": {"recipe": "sft"},
    "self-distillation, frozen, reverse KL": {
        "teacher": {**OWN, "weights": "frozen"}, "objective": "reverse_kl", "responses": ON_POLICY,
    },
    "self-distillation on the rows' text, frozen, forward KL": {
        "teacher": {**OWN, "weights": "frozen"}, "objective": "forward_kl", "responses": "fixed",
    },
}  # fmt: skip
"""What each changes in the run that all share."""


class Bench:
    """The data, the start, and one run of a method at a time, in a folder of its own."""

    def __init__(self, folder: Path, small: bool) -> None:
        self.folder, self.small = folder, small
        train = list(rows("train"))
        old, new = (
            [one for one in train if (NEW in one["prompt"]) is wanted and len(one["outputs"]) > 1]
            for wanted in (False, True)
        )
        if small:
            old, new = old[:32], new[:16]
        self.counts = {"rows of the start": 2 * len(old), "new rows": len(new[:400])}
        write_jsonl(folder / "start.jsonl", list(with_and_without_hint(old)))
        write_jsonl(folder / "new.jsonl", [plain(one) for one in new[:400]])
        held_out = list(rows("eval"))
        for name, wanted in (("old", False), ("new", True)):
            found = [one for one in held_out if (NEW in one["prompt"]) is wanted]
            write_jsonl(folder / f"{name}-eval.jsonl", found[:4] if small else found)
            hinted = [row | {"prompt": hinted_prompt(row)} for row in found if len(row["outputs"]) > 1]
            write_jsonl(folder / f"{name}-hinted-eval.jsonl", hinted[:4] if small else hinted)
            self.counts[f"held out, {name}"] = len(found)

    def config(self, name: str, seed: int, steps: int, **changes: Any) -> dict[str, Any]:
        """A run; evaluated on held-out rows of the new kind, and by a task on those of the old."""
        train = {
            "max_steps": 2 if self.small else steps,
            "batch_size": 16,
            "micro_batch_size": 16,
            "lr": 1e-3,
        }
        rules = {"warmup": 0.05, "seed": seed, "save_every": "never", "keep": "last"}
        return {
            "name": name,
            "data": {"template": "plain", "max_prompt": 192, "max_response": 80, **changes.pop("data")},
            "evaluate": {
                "data": str(self.folder / "new-eval.jsonl"), "before": False, "teacher": False,
                "sampling": {"temperature": 0.0}, "seeds": [1],
                "tasks": [{"kind": "instructions", "data": str(self.folder / "old-eval.jsonl"), "seeds": [1],
                           "sampling": {"temperature": 0.0}}],
            },
            "output": {"folder": str(self.folder / name), "report": False},
            "train": {**train, **rules, **changes.pop("train", {})},
            **changes,
        }  # fmt: skip

    def start(self) -> dict[str, float]:
        """Train the start, and what it says of both kinds of rows."""
        width = 32 if self.small else 96
        model = {
            "model_type": "llama", "hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 3 * width, "max_position_embeddings": 384, "tie_word_embeddings": True,
        }  # fmt: skip
        student = {"tokenizer": f"{DEMO}/teacher", "from_config": model}
        data = {"train": str(self.folder / "start.jsonl")}
        train = {"lr": 3e-3}
        config = self.config("start", 1, 500, recipe="sft", student=student, data=data, train=train)
        hinted = {"kind": "instructions", "data": str(self.folder / "new-hinted-eval.jsonl"), "seeds": [1]}
        config["evaluate"]["tasks"].append({**hinted, "sampling": {"temperature": 0.0}})
        stillhouse.run(config)
        return self.scores("start")

    def method(self, method: str, seed: int) -> dict[str, float]:
        """Learn the new rows by a method."""
        name = f"{list(METHODS).index(method)}-{seed}"
        data: dict[str, Any] = {"train": str(self.folder / "new.jsonl")}
        if "teacher" in METHODS[method]:
            data["teacher_context"] = CONTEXT
        student = {"path": str(self.folder / "start" / "student")}
        stillhouse.run(self.config(name, seed, 60, student=student, data=data, **METHODS[method]))
        return self.scores(name)

    def scores(self, name: str) -> dict[str, float]:
        """ROUGE-L over held-out rows of both kinds."""
        found = {}
        for path in sorted((self.folder / name / "evaluation").glob("student-after*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            kind = "hinted" if "hinted" in path.stem else "new" if path.stem == "student-after" else "old"
            found[kind] = float(result["metrics"]["rouge_l"])
        return found


def rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of the demonstration."""
    for line in locate(f"{DEMO}/data/{name}.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def plain(row: dict[str, Any]) -> dict[str, str]:
    """A row with its first reference."""
    return {"prompt": row["prompt"], "response": row["outputs"][0]}


def with_and_without_hint(some: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Each row twice: as it is, and with another of its references in the prompt."""
    for row in some:
        yield plain(row)
        yield {"prompt": hinted_prompt(row), "response": row["outputs"][0]}


def hinted_prompt(row: dict[str, Any]) -> str:
    """A prompt that holds the second reference of its row."""
    return CONTEXT.format(prompt=row["prompt"], response=row["outputs"][1])


def summary(method: str, found: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds with their standard errors."""
    row: dict[str, Any] = {"method": method, "seeds": len(found)}
    for kind in ("new", "old"):
        values = [one[kind] for one in found]
        row[f"rouge_l_{kind}"] = round(statistics.mean(values), 2)
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        row[f"rouge_l_{kind}_error"] = None if error is None else round(error, 2)
    return row


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="only see that it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.small)
        start = bench.start()
        table = [summary("the start", [start])]
        found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for seed in range(1, 2 if options.small else options.seeds + 1):
            for method in METHODS:
                found[method].append(bench.method(method, seed))
                print(seed, method, found[method][-1], flush=True)
        table += [summary(method, some) for method, some in found.items()]
    hinted = round(start["hinted"], 2)
    counted = {**bench.counts, "rouge_l_new_of_the_start_that_reads_an_example": hinted}
    for row in table:
        print(row)
    save(options.output, result(table, **counted))


if __name__ == "__main__":
    main()
