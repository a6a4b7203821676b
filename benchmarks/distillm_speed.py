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
that with two options of ours, `generate_batches: 4` and `cache_teacher_hidden: true`.

Quality and speed are measured apart. Quality: three seeds of every method (fewer where the table says
so), on a machine that may be busy. Speed (`--only speed`): all methods one after another, three times over
(the median counts), with the first seed, without validation and saving; phi follows a straight line from 0.2
to where it ended. Methods whose steps are all alike run 24 of them, scaled to all; those that draw at each
step what to do run all. What the teacher writes for SeqKD before training counts too. Seconds are processor
seconds of one thread. A further row is GKD by TRL (`pip install trl`) with the same models, prompts,
settings and first seed, left out where TRL is missing.

    python benchmarks/distillm_speed.py --folder runs/distillm-speed     # about an hour on a free core
    python benchmarks/distillm_speed.py --folder runs/small --small      # a check that it runs

Writes benchmarks/results/distillm_speed.{json,png,md} (with --small into --folder). A folder that holds
finished runs is gone on with.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _distillm_results import markdown, measure, plot, summary, timed
from _distillm_runs import DATA, RESULTS, done, llama, measure_processor_time, parser, run
from _result import result, save

measure_processor_time()
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
        "responses": {"student_share": SHARE, "cache_teacher_hidden": True, "generate_batches": 4},
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
    timed_steps: int = 24


SMALL = Size(
    teacher=(64, 2), student=(32, 2), rows=32, teacher_epochs=0.02, warm_steps=6, steps=6, batch=4,
    max_response=64, validate_every=3, valid=4, limit=8, seeds=1, timed_steps=6,
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
    """A Llama with heads of 32."""
    width, layers = size
    return llama(tokenizer, width, layers, heads=max(1, width // 32))


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


def slug_of(name: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{name.lower().replace(', ', '-').replace(' ', '-')}-{seed}"


def quality(
    size: Size, folder: Path, seeds: int, models: tuple[Path, Path], train: bool
) -> dict[str, list[dict[str, Any]]]:
    """Train every method with every seed, or only read what has been trained; what each run has come to."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        for name, method in METHODS.items():
            slug = slug_of(name, seed)
            if train or done(folder / slug):
                found[name].append(measure(run(configuration(size, folder, slug, method, seed, models))))
                print(f"{slug}: ROUGE-L {found[name][-1]['rouge_l']:.1f}", flush=True)
    return {name: runs for name, runs in found.items() if runs}


def speed(
    size: Size, folder: Path, found: dict[str, list[dict[str, Any]]], models: tuple[Path, Path], timings: int
) -> dict[str, dict[str, Any]]:
    """Train all methods in turn for their seconds, so many times; of each method the median timing."""
    rounds = [once(size, folder / "timing" / str(number), found, models) for number in range(timings)]
    times = {}
    for name in rounds[0]:
        each = sorted((times_of[name] for times_of in rounds), key=lambda time: time["seconds"])
        times[name] = each[len(each) // 2] | {"seconds_each": [time["seconds"] for time in each]}
    return times


def once(
    size: Size, folder: Path, found: dict[str, list[dict[str, Any]]], models: tuple[Path, Path]
) -> dict[str, dict[str, Any]]:
    """One timing of every method."""
    times = {}
    for name in METHODS:
        method = {**METHODS[name], "responses": dict(METHODS[name].get("responses", {}))}
        share = method["responses"].get("student_share")
        if share is not None:
            known = found.get(name) or found["DistiLLM"]
            end = sum(run["phi"] for run in known) / len(known)
            method["responses"]["student_share"] = {"kind": "linear", "start": share["start"], "end": end}
        alike = share is None and name != "GKD"
        steps = size.timed_steps if alike else size.steps
        every = {"max_steps": steps, "log_every": 2, "validate_every": "never"}
        method["train"] = {**method.get("train", {}), **every}
        config = configuration(size, folder, slug_of(name, 0), method, 0, models)
        config["evaluate"] |= {"limit": 1}
        times[name] = timed(run(config), size.steps)
        print(f"{name}: {times[name]['seconds']:.1f} s", flush=True)
    if importlib.util.find_spec("trl"):
        import _trl_gkd

        config = configuration(size, folder, "trl-gkd-0", METHODS["GKD"], 0, models)
        times[PEER] = _trl_gkd.train(config)
        print(f"{PEER}: {times[PEER]['seconds']:.1f} s", flush=True)
    return times


def write(rows: list[dict[str, Any]], size: Size, out: Path) -> None:
    """JSON, table and plot."""
    import torch

    facts = {"cpu": torch.backends.cpu.get_cpu_capability(), "size": vars(size), "methods": METHODS}
    out.mkdir(parents=True, exist_ok=True)
    save(out / "distillm_speed.json", result(rows, **facts))
    (out / "distillm_speed.md").write_text(markdown(rows), encoding="utf-8")
    plot(rows, out / "distillm_speed.png")
    print(markdown(rows))


def main() -> None:
    """Train what is missing, measure, write."""
    import torch

    known = parser(__doc__, "runs/distillm-speed")
    known.add_argument("--steps", type=int, help=f"optimiser steps of each method, not {Size.steps}")
    known.add_argument("--timings", type=int, help="how often each method is timed; default: 3")
    known.add_argument(
        "--only",
        choices=("teacher", "student", "speed"),
        help="stop after making this model, or time the methods whose quality has been measured",
    )
    options = known.parse_args()
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
    found = quality(size, folder, options.seeds or size.seeds, models, train=options.only != "speed")
    timings = options.timings or (1 if options.small else 3)
    times = speed(size, folder, found, models, timings)
    write(summary(found, times), size, folder if options.small else RESULTS)


if __name__ == "__main__":
    main()
