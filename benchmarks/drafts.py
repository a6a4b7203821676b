"""A draft model before and after DistillSpec: acceptance, block efficiency and the measured speed-up.

The target is the demonstration's teacher (2M parameters, 4 layers, E2E NLG), the draft its first and last
layer after a short supervised start. It is distilled on its own text of all prompts by forward KL, and judged
on held-out ones of three kinds of venue by name. Intervals: 95 %, Student's t over three seeds.

    python benchmarks/drafts.py --output benchmarks/results/drafts.json
    python benchmarks/drafts.py --small
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

from stillhouse.files import write_jsonl

SEEDS = (0, 1, 2)
T_OF_THREE = 4.303
"""97.5 % point of Student's t with two degrees of freedom."""
KINDS = ("pub", "restaurant", "coffee-shop")
TARGET = "package:stillhouse/demo/teacher"
DRAFT = {"from_teacher": {"layers": [0, 3]}}


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


def execute(folder: Path, seed: int, steps: int, evaluate: dict[str, Any], **changes: Any) -> Path:
    """Run a configuration; its folder."""
    from stillhouse.runs.execute import execute as run
    from stillhouse.runs.resolve import resolve

    train = {"batch_size": 16, "micro_batch_size": 16, "warmup": 0.05, "seed": seed, "max_steps": steps}
    train |= {"validate_every": "never", "save_every": "never", "lr": 1e-3, "log_every": 20}
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
    """The draft judged on all prompts for each gamma and timed, and by name for one of them."""
    common = {"kind": "speculative", "limit": limit, "gamma": 4}
    common["sampling"] = {"temperature": 1.0, "max_tokens": 40}
    return [
        {**common, "name": name, "data": path, **({} if name == "all" else {"gammas": [4], "speed": False})}
        for name, path in sets.items()
    ]


def measured(folder: Path, system: str) -> dict[str, dict[str, Any]]:
    """Task -> metrics."""
    found = [json.loads(path.read_text("utf-8")) for path in folder.glob(f"evaluation/{system}.*.json")]
    return {one["task"]: one["metrics"] for one in found}


def mean_and_half(values: list[float]) -> dict[str, float]:
    """The mean, and half of its interval where there are three."""
    found = {"mean": round(statistics.mean(values), 4)}
    if len(values) == len(SEEDS):
        found["half"] = round(T_OF_THREE * statistics.stdev(values) / len(values) ** 0.5, 4)
    return found


def rows_of(state: str, results: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the table: one for each task, with the gammas of `all`."""
    made = []
    for task in results[0]:
        row: dict[str, Any] = {"state": state, "task": task}
        for name in ("acceptance_rate", "block_efficiency", "speed_up", "teacher_tokens_per_second"):
            values = [one[task][name] for one in results if name in one[task]]
            if values:
                row[name] = mean_and_half(values)
        points = [one[task]["by_gamma"] for one in results]
        if len(points[0]) > 1:
            row["by_gamma"] = [
                {
                    "gamma": same[0]["gamma"],
                    **{
                        name: mean_and_half([point[name] for point in same])
                        for name in ("acceptance_rate", "block_efficiency")
                    },
                }
                for same in zip(*points, strict=True)
            ]
        made.append(row)
    return made


def table(place: Path, small: bool) -> list[dict[str, Any]]:
    """The draft before and after."""
    sets = write_tasks(place)
    limit, start, steps = (2, 4, 4) if small else (12, 60, 60)
    target = {"kind": "live", "path": TARGET, "dtype": "float32"}
    warm = execute(place / "warm", 0, start, {}, recipe="sft", student=DRAFT, teacher=target)
    before: dict[str, dict[str, Any]] = {}
    after = []
    for seed in SEEDS[:1] if small else SEEDS:
        folder = execute(
            place / f"draft-{seed}",
            seed,
            steps,
            {"tasks": tasks(sets, limit), "before": seed == 0},
            recipe="distillspec",
            student={"path": str(warm)},
            teacher=target,
        )
        before = before or measured(folder, "student-before")
        after.append(measured(folder, "student-after"))
        print(json.dumps({"seed": seed, "all": after[-1]["all"]}), file=sys.stderr, flush=True)
    return [*rows_of("before", [before]), *rows_of("after", after)]


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
    found = {
        "command": "python benchmarks/drafts.py --output benchmarks/results/drafts.json",
        "date": datetime.date.today().isoformat(),
        "versions": {name: metadata.version(name) for name in ("stillhouse", "torch", "transformers")}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "seeds": list(SEEDS),
        "rows": rows,
    }
    text = json.dumps(found, indent=2) + "\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
