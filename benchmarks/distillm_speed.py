"""DistiLLM's headline: what on-policy distillation costs, and what adaptive off-policy with replay saves.

One task (cleaned E2E NLG with a byte-level BPE of 320, so that responses have about 64 tokens), one student
of 1.9 M parameters warm-started on 300 rows, one teacher of 4.8 M trained on all 8,349 texts; every method
gets the same 300 prompts, steps, batches and seeds. Seconds are those of training alone: validation is timed
apart, saving is off. They are processor seconds of one thread, which on an idle machine are wall-clock and
on a shared one do not depend on others.

    python benchmarks/distillm_speed.py --folder runs/distillm-speed             # 3 seeds: half an hour
    python benchmarks/distillm_speed.py --folder runs/small --small              # a check that it runs

Writes benchmarks/results/distillm_speed.{json,png,md} (with --small into --folder). A folder that holds
finished runs is gone on with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

time.perf_counter = time.process_time  # before anything that measures is imported
RESULTS = Path(__file__).parent / "results"
DATA = "package:stillhouse/demo/data"
SHARE = {"kind": "dev_loss", "start": 0.5, "step": 0.1, "tolerance": 0.0}
"""Starts at GKD's share of student text, not at 0, so that it is not fast by training on less of it."""
METHODS: dict[str, dict[str, Any]] = {
    "KD": {"recipe": "kd"},
    "SeqKD": {"recipe": "seqkd"},
    "ImitKD": {"recipe": "imitkd"},
    "GKD": {"recipe": "gkd"},
    "MiniLLM": {"recipe": "minillm"},
    "DistiLLM, no replay": {
        "recipe": "distillm",
        "responses": {"student_share": SHARE, "fresh_share": 1.0, "train_on_fresh": True},
    },
    "DistiLLM": {
        "recipe": "distillm",
        "responses": {"student_share": SHARE, "keep_teacher": True, "write_batches": 4},
    },
}


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    vocabulary: int = 320
    teacher: tuple[int, int] = (256, 6)
    student: tuple[int, int] = (192, 4)
    rows: int = 300
    teacher_epochs: float = 4.0
    warm_steps: int = 100
    steps: int = 60
    batch: int = 8
    max_response: int = 112
    validate_every: int = 15
    valid: int = 16
    limit: int = 40
    seeds: int = 3


SMALL = Size(
    teacher=(64, 2), student=(48, 2), rows=32, teacher_epochs=0.02, warm_steps=6, steps=6, batch=4,
    max_response=64, validate_every=3, valid=4, limit=8, seeds=1,
)  # fmt: skip


def tree(size: Size, folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """What all runs share."""
    train = {
        "batch_size": size.batch, "micro_batch_size": size.batch, "lr": 5e-4, "warmup": 0.05, "log_every": 5,
        "save_every": "never", "precision": "bfloat16", "validate_every": size.validate_every,
        **more.pop("train", {}),
    }  # fmt: skip
    return {
        "name": name,
        "data": {
            "train": {"kind": "jsonl", "path": f"{DATA}/train.jsonl", "limit": size.rows},
            "valid": f"{DATA}/dev.jsonl", "template": {"kind": "plain"}, "no_response": "drop",
            "max_prompt": 160, "max_response": size.max_response,
        },
        "train": train,
        "evaluate": {
            "data": f"{DATA}/eval.jsonl", "before": False, "teacher": False, "valid_limit": size.valid,
            "limit": size.limit,
        },
        "output": {"folder": str(folder / name), "report": False},
        **more,
    }  # fmt: skip


def model(size: tuple[int, int], tokenizer: Path) -> dict[str, Any]:
    """A Llama from random weights."""
    width, layers = size
    return {
        "tokenizer": str(tokenizer),
        "from_config": {
            "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // 32), "num_key_value_heads": max(1, width // 32),
            "intermediate_size": width * 8 // 3, "max_position_embeddings": 320, "tie_word_embeddings": True,
        },
    }  # fmt: skip


def done(folder: Path) -> bool:
    """Whether a run has come to its end."""
    state = folder / "state.json"
    return state.exists() and json.loads(state.read_text())["state"] == "done"


def run(config: dict[str, Any]) -> Path:
    """Run a configuration unless it has been; its folder."""
    import shutil

    import stillhouse

    folder = Path(config["output"]["folder"])
    if not done(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if stillhouse.run(config).state != "done":
            raise SystemExit(
                f"{folder}: interrupted; run the same command again to go on with the other runs"
            )
    return folder


def prepare(size: Size, folder: Path) -> tuple[Path, Path]:
    """Tokenizer, teacher and warm-started student; the folders of the two models."""
    from stillhouse.demo import make_teacher
    from stillhouse.files import locate

    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        make_teacher.VOCABULARY = size.vocabulary
        rows = [
            json.loads(line)
            for line in locate(f"{DATA}/train.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        make_teacher.train_tokenizer(rows, tokenizer)
    teacher = tree(
        size, folder, "teacher", recipe="sft", student=model(size.teacher, tokenizer),
        train={"epochs": size.teacher_epochs, "lr": 2e-3, "validate_every": "never", "batch_size": 32,
               "micro_batch_size": 32},
    )  # fmt: skip
    teacher["data"] |= {"train": {"kind": "jsonl", "path": f"{DATA}/train.jsonl", "each_output": True}}
    warm = tree(
        size, folder, "warm-start", recipe="sft", student=model(size.student, tokenizer),
        train={"max_steps": size.warm_steps, "lr": 2e-3, "validate_every": "never",
               "batch_size": size.batch * 2, "micro_batch_size": size.batch * 2},
    )  # fmt: skip
    return run(teacher) / "student", run(warm) / "student"


def measure(folder: Path) -> dict[str, Any]:
    """Seconds of training, where they went, and quality against time, from the files of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    after = json.loads((folder / "evaluation" / "student-after.json").read_text(encoding="utf-8"))["metrics"]
    seconds, curve, parts, written = 0.0, [], dict.fromkeys(("generate", "teacher", "student"), 0.0), 0.0
    for row in sorted(rows, key=lambda row: (row["step"], row["phase"])):  # train before valid
        if row["phase"] == "train":
            seconds += row["seconds"]
            written += row.get("responses/student", 0.0)
            for part in parts:
                parts[part] += row.get(f"seconds/{part}", 0.0)
        else:
            curve.append([row["step"], seconds, row["rouge_l"], row["loss"]])
    parts["backward and optimiser"] = seconds - sum(parts.values())
    return {
        "seconds": seconds, "parts": parts, "curve": curve, "steps": max(row["step"] for row in rows),
        "rouge_l": after["rouge_l"], "dev_rouge_l": curve[-1][2], "dev_loss": curve[-1][3],
        "mean_length": after["mean_length"],
        "student_share": written / max(1, sum(row["phase"] == "train" for row in rows)),
    }  # fmt: skip


def time_to(curve: list[list[float]], target: float) -> float | None:
    """Seconds of training until a mean curve first reaches a quality, between points in a straight line."""
    for before, after in pairwise(curve):
        if after[2] >= target:
            if before[2] >= target:
                return before[1]
            return before[1] + (after[1] - before[1]) * (target - before[2]) / (after[2] - before[2])
    return None


def summary(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each method: means over the seeds, and ratios to KD."""
    rows = []
    curves = {
        name: [[statistics.mean(values) for values in zip(*points, strict=True)]
               for points in zip(*(run["curve"] for run in runs), strict=True)]
        for name, runs in found.items()
    }  # fmt: skip
    target = curves["GKD"][-1][2]
    base = statistics.mean(run["seconds"] for run in found["KD"])
    for name, runs in found.items():
        seconds = statistics.mean(run["seconds"] for run in runs)
        rouge = [run["rouge_l"] for run in runs]
        rows.append({
            "method": name, "seconds": seconds, "times_kd": seconds / base,
            "rouge_l": statistics.mean(rouge),
            "rouge_l_sd": statistics.stdev(rouge) if len(rouge) > 1 else 0.0,
            "dev_loss": statistics.mean(run["dev_loss"] for run in runs),
            "seconds_to_gkds_quality": time_to(curves[name], target),
            "student_share": statistics.mean(r["student_share"] for r in runs),
            "parts": {part: statistics.mean(run["parts"][part] for run in runs) for part in runs[0]["parts"]},
            "curve": curves[name],
        })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| method | seconds | x KD | writing | teacher | forward | rest | student text | ROUGE-L | dev loss "
        "| s to GKD's ROUGE |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reached = row["seconds_to_gkds_quality"]
        parts = " | ".join(f"{value:.1f}" for value in row["parts"].values())
        lines.append(
            f"| {row['method']} | {row['seconds']:.1f} | {row['times_kd']:.2f} | {parts} "
            f"| {row['student_share']:.2f} | {row['rouge_l']:.1f} ± {row['rouge_l_sd']:.1f} "
            f"| {row['dev_loss']:.3f} | {'-' if reached is None else f'{reached:.1f}'} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Quality against wall-clock."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for row in rows:
        axes.plot(
            [p[1] for p in row["curve"]],
            [p[2] for p in row["curve"]],
            marker="o",
            markersize=3,
            label=row["method"],
        )
    axes.set(
        xlabel="seconds of training", ylabel="validation ROUGE-L", title="Same number of steps, mean of seeds"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train what is missing, measure, write."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/distillm-speed"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seeds", type=int, help="fewer or more than the 3 of the full run")
    parser.add_argument("--steps", type=int, help="optimiser steps of each method; 60 unless given")
    parser.add_argument("--only", choices=("prepare",), help="stop after teacher and warm start")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = SMALL if options.small else Size()
    if options.steps:
        size = replace(size, steps=options.steps, validate_every=max(1, options.steps // 4))
    folder, start = options.folder.resolve(), time.monotonic()
    teacher, student = prepare(size, folder)
    if options.only == "prepare":
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in range(options.seeds or size.seeds):
        for name, method in METHODS.items():
            slug = f"{name.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
            config = tree(
                size, folder, slug, student={"path": str(student)}, **method,
                teacher={"kind": "live", "path": str(teacher), "dtype": "bfloat16"},
                train={"max_steps": size.steps, "seed": seed},
            )  # fmt: skip
            found[name].append(measure(run(config)))
            print(
                f"{slug}: {found[name][-1]['seconds']:.1f} s, ROUGE-L {found[name][-1]['rouge_l']:.1f}",
                flush=True,
            )
    rows = summary(found)
    out = folder if options.small else RESULTS
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "size": vars(size), "seeds": options.seeds or size.seeds, "threads": 1,
        "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
        "minutes": (time.monotonic() - start) / 60, "rows": rows, "runs": found,
    }  # fmt: skip
    (out / "distillm_speed.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / "distillm_speed.md").write_text(markdown(rows), encoding="utf-8")
    plot(rows, out / "distillm_speed.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
