"""A draft model before and after DistillSpec, by objective: acceptance, block efficiency, measured speed-up.

The target is a Llama of 16 layers (E2E NLG): each of the 4 layers of the demonstration's teacher followed by
three new ones that add nothing at first (LLaMA Pro, arXiv 2401.02415), then trained on the data. The draft is
the first and the last of the old layers, after a short supervised start. It is distilled on its own text of
all prompts, and judged on held-out ones, also greedily, and on those of three kinds of venue by name.

    nice -n 15 python benchmarks/drafts.py --output benchmarks/results/drafts.json
    python benchmarks/drafts.py --small
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from _result import result, save

from stillhouse.files import write_jsonl

SEED = 0
KINDS = ("pub", "restaurant", "coffee-shop")
SMALLER = "package:stillhouse/demo/teacher"
LAYERS = 16
DRAFT = {"from_teacher": {"layers": [0, LAYERS - LAYERS // 4]}}
OBJECTIVES = {"forward KL": "forward_kl", "reverse KL": "reverse_kl", "TVD": "tvd"}
MEASURES = ("acceptance_rate", "block_efficiency", "speed_up", "teacher_tokens_per_second")


def write_tasks(folder: Path) -> dict[str, str]:
    """The held-out rows by kind of venue, and all of them."""
    source = files("stillhouse").joinpath("demo/data/eval.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in source.splitlines()]
    sets = {
        kind: [row for row in rows if f"eatType[{kind.replace('-', ' ')}]" in row["prompt"]] for kind in KINDS
    }
    for name, some in {"all": rows, **sets}.items():
        write_jsonl(folder / f"{name}.jsonl", some)
    return {name: str(folder / f"{name}.jsonl") for name in ("all", *KINDS)}


def grow(folder: Path) -> Path:
    """The demonstration's teacher with new layers whose output is zero, so that it computes what it did."""
    import torch
    from transformers import AutoModelForCausalLM

    from stillhouse.models import TeacherModel, load_teacher, load_tokenizer

    source = TeacherModel(path=SMALLER, dtype="float32")
    small: Any = load_teacher(source)
    config = type(small.config).from_dict({**small.config.to_dict(), "num_hidden_layers": LAYERS})
    large = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = small.state_dict()
    times = LAYERS // len(small.model.layers)
    for place in range(LAYERS):
        own = small.model.layers[place // times].state_dict()
        for name, weight in own.items():
            adds = name in {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
            weights[f"model.layers.{place}.{name}"] = (
                torch.zeros_like(weight) if adds and place % times else weight
            )
    large.load_state_dict(weights)
    large.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


def execute(folder: Path, steps: int, evaluate: dict[str, Any], **changes: Any) -> Path:
    """Run a configuration; its folder."""
    from stillhouse.runs.execute import execute as run
    from stillhouse.runs.resolve import resolve

    train = {"batch_size": 16, "micro_batch_size": 16, "warmup": 0.05, "seed": SEED, "max_steps": steps}
    train |= {"validate_every": "never", "save_every": "never", "lr": 1e-3, "log_every": 10}
    tree = {
        "name": folder.name,
        "data": {
            "train": "package:stillhouse/demo/data/train.jsonl", "template": {"kind": "plain"},
            "max_prompt": 128, "max_response": 64, "no_response": "drop",
        },
        "train": train,
        "evaluate": {"before": False, "teacher": False, **evaluate},
        "output": {"folder": str(folder), "report": False},
        **changes,
    }  # fmt: skip
    return run(resolve(tree)).folder


def tasks(sets: dict[str, str], limit: int) -> list[dict[str, Any]]:
    """The draft judged on all prompts for each gamma and timed, greedily and timed, and by kind of venue."""
    common = {"kind": "speculative", "limit": limit, "gamma": 4}
    sampled = {"temperature": 1.0, "max_tokens": 24}
    found = [{**common, "name": "all", "data": sets["all"], "sampling": sampled}]
    greedy = {"temperature": 0.0, "max_tokens": 24}
    found.append({**common, "name": "greedy", "data": sets["all"], "sampling": greedy, "gammas": [4]})
    return found + [
        {**common, "name": kind, "data": sets[kind], "sampling": sampled, "gammas": [4], "speed": False}
        for kind in KINDS
    ]


def rows_of(folder: Path, system: str, state: str) -> list[dict[str, Any]]:
    """Rows of the table: one for each task, with the gammas of `all`."""
    found = [json.loads(path.read_text("utf-8")) for path in folder.glob(f"evaluation/{system}.*.json")]
    made = []
    for one in sorted(found, key=lambda one: one["task"]):
        metrics = one["metrics"]
        row = {"state": state, "task": one["task"]}
        row |= {name: round(metrics[name], 4) for name in MEASURES if name in metrics}
        if len(metrics["by_gamma"]) > 1:
            names = ("gamma", "acceptance_rate", "block_efficiency")
            row["by_gamma"] = [
                {name: round(point[name], 4) for name in names} for point in metrics["by_gamma"]
            ]
        made.append(row)
    return made


def table(place: Path, small: bool) -> list[dict[str, Any]]:
    """The draft before, and after each objective."""
    sets = write_tasks(place)
    limit, start, steps = (1, 2, 2) if small else (6, 30, 30)
    grown = grow(place / "grown")
    trained = execute(place / "target", start, {}, recipe="sft", student={"path": str(grown)})
    target = {"kind": "live", "path": str(trained / "student"), "dtype": "float32"}
    warm = execute(place / "warm", start, {}, recipe="sft", student=DRAFT, teacher=target)
    rows: list[dict[str, Any]] = []
    for name, objective in list(OBJECTIVES.items())[: 1 if small else None]:
        folder = execute(
            place / objective,
            steps,
            {"tasks": tasks(sets, limit), "before": not rows},
            recipe="distillspec",
            objective=objective,
            student={"path": str(warm)},
            teacher=target,
        )
        rows += [] if rows else rows_of(folder, "student-before", "before")
        rows += rows_of(folder, "student-after", name)
        print(json.dumps(rows[-5]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Run all of it and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few steps of one seed")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        rows = table(Path(place), options.small)
    found = result(rows, seeds=[SEED])
    print(json.dumps(found, indent=2))
    save(options.output, found)


if __name__ == "__main__":
    main()
