"""DistiLLM's headline: what on-policy distillation costs, and what adaptive off-policy with replay saves.

One task (cleaned E2E NLG with a byte-level BPE of 320, so that responses have about 80 tokens), one student
of 1.9M parameters (6 layers of 160) warm-started on 300 rows, one teacher of 4.8M (6 layers of 256) trained
on all 8,349 texts. Every method gets the same 300 prompts with their labels, the same steps, batches of 8 (as
in the papers), learning rate, precision and seeds; MiniLLM a fifth of the learning rate, as policy gradients
need (its paper: a hundredth). bfloat16 under autocast; the student's attention is eager, because the backward
pass of fused attention on CPU takes four times as long in bfloat16 as in float32.

DistiLLM's share of student text, phi, starts at 0.2 and rises by 0.1 whenever the validation loss does (the
rule of the paper's Algorithm 1 with a tolerance of 0; 0.2 is the start in its OpenLLaMA script). The same in
its three rows: fresh text at every such step (no replay); the paper's replay with a decreasing ratio; and
that with two options of ours, `write_batches: 4` and `keep_teacher: true`.

Seconds are those of training alone: validation is timed apart, saving is off. They are processor seconds of
one thread, which on an idle machine are wall-clock and on a shared one depend little on others; what the
teacher writes for SeqKD before training counts too. A further row is GKD by TRL (`pip install trl`) on the
same models, prompts and settings with the first seed; it is left out where TRL is missing.

    python benchmarks/distillm_speed.py --folder runs/distillm-speed             # 3 seeds: about an hour
    python benchmarks/distillm_speed.py --folder runs/small --small              # a check that it runs

Writes benchmarks/results/distillm_speed.{json,png,md} (with --small into --folder) after every seed. A folder
that holds finished runs is gone on with.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

time.perf_counter = time.process_time  # before anything that measures is imported
RESULTS = Path(__file__).parent / "results"
DATA = "package:stillhouse/demo/data"
SHARE = {"kind": "dev_loss", "start": 0.2, "step": 0.1, "tolerance": 0.0}
PEER = "GKD of TRL"
METHODS: dict[str, dict[str, Any]] = {
    "KD": {"recipe": "kd"},
    "SeqKD": {"recipe": "seqkd"},
    "ImitKD": {"recipe": "imitkd"},
    "GKD": {"recipe": "gkd"},
    "MiniLLM": {"recipe": "minillm", "train": {"lr": 2e-4}},
    "DistiLLM, no replay": {
        "recipe": "distillm",
        "responses": {"student_share": SHARE, "fresh_share": 1.0, "train_on_fresh": True},
    },
    "DistiLLM": {"recipe": "distillm", "responses": {"student_share": SHARE}},
    "DistiLLM, our options": {
        "recipe": "distillm",
        "responses": {"student_share": SHARE, "keep_teacher": True, "write_batches": 4},
    },
}


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    vocabulary: int = 320
    teacher: tuple[int, int] = (256, 6)
    student: tuple[int, int] = (160, 6)
    rows: int = 300
    teacher_epochs: float = 4.0
    warm_steps: int = 300
    steps: int = 80
    batch: int = 8
    max_response: int = 112
    validate_every: int = 8
    valid: int = 24
    limit: int = 120
    seeds: int = 3


SMALL = Size(
    teacher=(64, 2), student=(32, 2), rows=32, teacher_epochs=0.02, warm_steps=6, steps=6, batch=4,
    max_response=64, validate_every=3, valid=4, limit=8, seeds=1,
)  # fmt: skip


def tree(size: Size, folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """What all runs share."""
    train = {
        "batch_size": size.batch, "micro_batch_size": size.batch, "lr": 1e-3, "warmup": 0.05, "log_every": 5,
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


def make_tokenizer(size: Size, folder: Path) -> Path:
    """A byte-level BPE trained on the data; its folder."""
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
    return tokenizer


def make_teacher_model(size: Size, folder: Path) -> Path:
    """The teacher, trained on every text; its folder."""
    config = tree(
        size, folder, "teacher", recipe="sft", student=model(size.teacher, make_tokenizer(size, folder)),
        train={"epochs": size.teacher_epochs, "lr": 2e-3, "validate_every": "never", "batch_size": 32,
               "micro_batch_size": 32},
    )  # fmt: skip
    config["data"] |= {"train": {"kind": "jsonl", "path": f"{DATA}/train.jsonl", "each_output": True}}
    return run(config) / "student"


def make_student(size: Size, folder: Path) -> Path:
    """The student that every method starts from, fine-tuned on the labelled rows; its folder."""
    config = tree(
        size, folder, "student", recipe="sft", student=model(size.student, make_tokenizer(size, folder)),
        train={"max_steps": size.warm_steps, "lr": 3e-3, "validate_every": "never",
               "batch_size": size.batch * 2, "micro_batch_size": size.batch * 2},
    )  # fmt: skip
    return run(config) / "student"


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
    phi = [
        row["schedule/responses.student_share"] for row in rows if "schedule/responses.student_share" in row
    ]
    return {
        "seconds": seconds, "parts": parts, "curve": curve, "steps": max(row["step"] for row in rows),
        "rouge_l": after["rouge_l"], "dev_rouge_l": curve[-1][2], "dev_loss": curve[-1][3],
        "mean_length": after["mean_length"], **({"phi": phi[-1], "phi_curve": phi} if phi else {}),
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
    """One row for each method: means over the seeds, and ratios to KD. A peer has no parts and no curve."""
    rows = []
    curves = {
        name: [[statistics.mean(values) for values in zip(*points, strict=True)]
               for points in zip(*(run["curve"] for run in runs), strict=True)]
        for name, runs in found.items() if "curve" in runs[0]
    }  # fmt: skip
    target = curves["GKD"][-1][2]
    base = statistics.mean(run["seconds"] for run in found["KD"])
    for name, runs in found.items():
        rouge = [run["rouge_l"] for run in runs]
        mean = {
            key: statistics.mean(run[key] for run in runs)
            for key in runs[0]
            if isinstance(runs[0][key], float | int)
        }
        row = {
            "method": name, "seeds": len(runs), **mean, "times_kd": mean["seconds"] / base,
            "rouge_l_sd": statistics.stdev(rouge) if len(rouge) > 1 else 0.0, "each_seed": runs,
        }  # fmt: skip
        if name in curves:
            parts = runs[0]["parts"]
            row |= {
                "seconds_to_gkds_quality": time_to(curves[name], target),
                "parts": {part: statistics.mean(run["parts"][part] for run in runs) for part in parts},
                "curve": curves[name],
            }
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| method | seconds | x KD | writing | teacher | forward | rest | student text | phi at end "
        "| ROUGE-L | dev loss | s to GKD's ROUGE |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def shown(row: dict[str, Any], name: str, digits: int) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

    for row in rows:
        parts = " | ".join(f"{value:.1f}" for value in row.get("parts", {}).values()) or " | ".join("-" * 4)
        lines.append(
            f"| {row['method']} | {row['seconds']:.1f} | {row['times_kd']:.2f} | {parts} "
            f"| {shown(row, 'student_share', 2)} | {shown(row, 'phi', 2)} "
            f"| {row['rouge_l']:.1f} ± {row['rouge_l_sd']:.1f} "
            f"| {shown(row, 'dev_loss', 3)} | {shown(row, 'seconds_to_gkds_quality', 1)} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Quality against time, and where the time of each method goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "curve" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for number, row in enumerate(rows):
        x, y = [p[1] for p in row["curve"]], [p[2] for p in row["curve"]]
        left.plot(x, y, marker="o", markersize=3, color=f"C{number}", label=row["method"])
    left.set(xlabel="seconds of training", ylabel="validation ROUGE-L")
    left.set_title(f"same number of steps, mean of {rows[0]['seeds']} seeds", fontsize=10)
    left.set_xscale("symlog", linthresh=20)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    names, start = [row["method"] for row in rows][::-1], [0.0] * len(rows)
    for number, part in enumerate(rows[0]["parts"]):
        widths = [row["parts"][part] for row in rows][::-1]
        right.barh(names, widths, left=start, color=f"C{number}", label="writing" if not number else part)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.set(xlabel="seconds of training")
    right.set_title("where they go", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def write(found: dict[str, list[dict[str, Any]]], size: Size, out: Path) -> None:
    """JSON, table and plot of the seeds so far."""
    import torch
    import transformers

    from stillhouse.files import write_json

    rows = summary(found)
    command = " ".join(["python", "benchmarks/distillm_speed.py", *sys.argv[1:]])
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    facts = {"cpu": torch.backends.cpu.get_cpu_capability(), "size": vars(size), "methods": METHODS}
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "distillm_speed.json",
        {"command": command, "date": date.today().isoformat(), "versions": versions, "threads": 1, **facts,
         "rows": rows},
    )  # fmt: skip
    (out / "distillm_speed.md").write_text(markdown(rows), encoding="utf-8")
    plot(rows, out / "distillm_speed.png")


def configuration(
    size: Size, folder: Path, slug: str, method: dict[str, Any], seed: int, models: tuple[Path, Path]
) -> dict[str, Any]:
    """The run of a method with a seed."""
    method = dict(method)
    train = {"max_steps": size.steps, "seed": seed, **method.pop("train", {})}
    teacher, student = models
    return tree(
        size, folder, slug, **method, train=train,
        student={"path": str(student), "attention": "eager"},
        teacher={"kind": "live", "path": str(teacher), "dtype": "bfloat16"},
    )  # fmt: skip


def one(size: Size, folder: Path, name: str, seed: int, models: tuple[Path, Path]) -> dict[str, Any]:
    """Train one method with one seed and measure it."""
    slug = f"{name.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
    result = measure(run(configuration(size, folder, slug, METHODS[name], seed, models)))
    print(f"{slug}: {result['seconds']:.1f} s, ROUGE-L {result['rouge_l']:.1f}", flush=True)
    return result


def of_peer(size: Size, folder: Path, seed: int, models: tuple[Path, Path]) -> dict[str, Any]:
    """The same for TRL's GKD."""
    import trl_gkd

    slug = f"trl-gkd-{seed}"
    result = trl_gkd.train(configuration(size, folder, slug, METHODS["GKD"], seed, models))
    print(f"{slug}: {result['seconds']:.1f} s, ROUGE-L {result['rouge_l']:.1f}", flush=True)
    return result


def main() -> None:
    """Train what is missing, measure, write."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/distillm-speed"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seeds", type=int, help="fewer or more than the 3 of the full run")
    parser.add_argument("--steps", type=int, help=f"optimiser steps of each method, not {Size.steps}")
    parser.add_argument("--only", choices=("teacher", "student"), help="stop after making this model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = SMALL if options.small else Size()
    if options.steps:
        size = replace(size, steps=options.steps, validate_every=max(1, options.steps // 10))
    folder = options.folder.resolve()
    if options.only == "student":
        make_student(size, folder)
        return
    teacher = make_teacher_model(size, folder)
    if options.only == "teacher":
        return
    models = teacher, make_student(size, folder)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}  # one more where TRL is there
    for seed in range(options.seeds or size.seeds):
        for name in METHODS:
            found[name].append(one(size, folder, name, seed, models))
        if seed == 0 and importlib.util.find_spec("trl"):
            found.setdefault(PEER, []).append(of_peer(size, folder, seed, models))
        write(found, size, folder if options.small else RESULTS)
    print(markdown(summary(found)))


if __name__ == "__main__":
    main()
