"""A sweep of three methods by three seeds, interrupted twice, against one that was not; what sharing saves.

The demonstration's teacher (2M parameters, E2E NLG) and its first and last layer as the student. One sweep
runs straight; a second one, with the same file, is sent SIGINT in one run, goes on, loses its own process to
SIGKILL in a later run, and goes on: weights of all students, answers, metrics and losses must be the same to
the bit. A third one shares nothing. Tokens that the teacher wrote or read are counted from what the runs
recorded; its reading of references where a student is evaluated is left out, which no sweep shares.

    python benchmarks/sweeps.py --output benchmarks/results/sweeps.json
    python benchmarks/sweeps.py --small      # two methods, one seed, interrupted once; shares everything
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from _result import result, save

from stillhouse.files import write_json

DEMO = "package:stillhouse/demo"
SAMPLING = {"temperature": 0.8, "top_p": 0.95}
METHODS: dict[str, dict[str, Any]] = {
    "KD": {"recipe": "kd"},
    "SeqKD": {"recipe": "seqkd", "responses.sampling": SAMPLING},
    "DistiLLM-2": {"recipe": "distillm2", "engine.sampling": SAMPLING},
}
SEEDS = (1, 2, 3)
T_OF_THREE = 4.303
"""97.5 % point of Student's t with two degrees of freedom."""
SHOWN = ("rouge_l", "kl_to_teacher", "top1_agreement")
PATIENCE = 1800
"""Seconds until a sweep must have come where it is to be interrupted."""


def tree(folder: Path, small: bool) -> dict[str, Any]:
    """The sweep's file."""
    batch = 8 if small else 16
    return {
        "name": folder.name,
        "folder": str(folder),
        "run": {
            "student": {"from_teacher": {"layers": [0, 3]}},
            "teacher": {"kind": "live", "path": f"{DEMO}/teacher", "dtype": "float32"},
            "data": {
                "train": {"path": f"{DEMO}/data/train.jsonl", "limit": 16 if small else 128},
                "template": "plain", "max_prompt": 96, "max_response": 48,
            },
            "train": {
                "epochs": 2, "batch_size": batch, "micro_batch_size": batch, "lr": 1e-3, "warmup": 0.1,
                "log_every": 1, "save_every": 2 if small else 8,
            },
            "evaluate": {
                "data": {"path": f"{DEMO}/data/eval.jsonl", "limit": 2 if small else 40}, "before": False,
            },
        },
        "values": {"train.seed": list(SEEDS[: 1 if small else 3])},
        "variants": {"method": dict(list(METHODS.items())[: 2 if small else 3])},
    }  # fmt: skip


def run(folder: Path, source: dict[str, Any], number: int | None = None, at: Path | None = None) -> int:
    """Run a sweep by the command line; its exit status.

    Args:
        folder: where its file and what it says go.
        source: the sweep.
        number: a signal that its own process gets as soon as there is
        at: this file.
    """
    file = folder / f"{source['name']}.json"
    write_json(file, source)
    with (folder / f"{source['name']}.log").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "stillhouse", "sweep", str(file)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        if at is not None:
            began = time.monotonic()
            while not at.exists() and process.poll() is None and time.monotonic() - began < PATIENCE:
                time.sleep(0.05)
            assert at.exists(), f"{at} did not come; see {log.name}"
            process.send_signal(number or signal.SIGINT)
        return process.wait()


def interrupted(
    folder: Path, source: dict[str, Any], stops: dict[str, signal.Signals]
) -> list[dict[str, Any]]:
    """Interrupt a sweep at a checkpoint of each of the runs, and go on; what happened."""
    told = []
    step = source["run"]["train"]["save_every"]
    for name, number in stops.items():
        sign = Path(source["folder"]) / "runs" / name / "checkpoints" / f"checkpoint-{step}" / "complete.json"
        assert not sign.exists(), f"{sign} is there already"
        status = run(folder, source, number, sign)
        lines = json.loads((Path(source["folder"]) / "sweep.json").read_text(encoding="utf-8"))["runs"]
        states = [line["state"] for line in lines.values()]
        assert status != 0, f"{number.name} did not stop the sweep"
        assert lines[name]["state"] != "done", f"{name} was done before it was interrupted"
        told.append(
            {"signal": number.name, "in": name, "exit status": status, "done before": states.count("done")}
        )
    assert run(folder, source) == 0
    return told


def outcome(folder: Path) -> dict[str, str]:
    """Digests of what each run has come to: student, answers, metrics, losses."""
    found = {}
    for place in sorted((folder / "runs").iterdir()):
        losses = [
            [row["step"], row["loss"]] for row in rows(place / "metrics.jsonl") if row.get("phase") == "train"
        ]
        last = {step: loss for step, loss in losses}  # a resumed run has logged some steps twice
        texts = {
            "weights": (place / "student" / "model.safetensors").read_bytes(),
            "answers": (place / "evaluation" / "student-after.jsonl").read_bytes(),
            "metrics": json.dumps(
                {name: value for name, value in metrics(place).items() if name != "tokens_per_second"}
            ).encode(),
            "losses": json.dumps(last).encode(),
        }
        found |= {f"{place.name}, {name}": hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(place: Path) -> dict[str, float]:
    """Of the student after training."""
    found: dict[str, float] = json.loads(
        (place / "evaluation" / "student-after.json").read_text(encoding="utf-8")
    )["metrics"]
    return found


def tokens_of_the_teacher(folder: Path) -> dict[str, int]:
    """Tokens that the teacher wrote and read in a sweep that ran straight.

    Text for training and evaluation counts where a run did not take it from another (`shared/ledger.jsonl`);
    what a live teacher read, each run has logged; a cache was filled with one epoch of the texts.
    """
    ledger = folder / "shared" / "ledger.jsonl"
    taken = {(one["run"], one["what"]) for one in (rows(ledger) if ledger.exists() else ()) if one["taken"]}
    counted = {"written for training": 0, "written for evaluation": 0, "read": 0}
    filled = False
    for place in sorted((folder / "runs").iterdir()):
        for file in place.glob("responses/teacher-*.jsonl"):
            if (place.name, file.stem) not in taken:
                counted["written for training"] += sum(len(row.get("token_ids", ())) for row in rows(file))
        if (place.name, "teacher") not in taken:
            answers = rows(place / "evaluation" / "teacher.jsonl")
            counted["written for evaluation"] += sum(row["tokens"] for row in answers)
        steps = [row for row in rows(place / "metrics.jsonl") if row.get("phase") == "train"]
        counted["read"] += round(sum(row.get("tokens/teacher", 0) for row in steps))
        if not filled and any("cache/hits" in row for row in steps):
            counted["read"] += round(sum(row["tokens/student"] for row in steps if row["epoch"] <= 1))
            filled = True
    return counted


def table(folder: Path) -> list[dict[str, Any]]:
    """A row for each method: means over seeds and half of the 95 % interval by Student's t."""
    made = []
    for method in METHODS:
        places = [folder / "runs" / f"{method}-seed-{seed}" for seed in SEEDS]
        places = [place for place in places if place.exists()]
        if not places:
            continue
        found = [metrics(place) for place in places]
        seconds = [
            json.loads((place / "state.json").read_text(encoding="utf-8"))["seconds"] for place in places
        ]
        row: dict[str, Any] = {"method": method, "seeds": len(places)}
        for name, values in {
            **{name: [one[name] for one in found] for name in SHOWN},
            "seconds": seconds,
        }.items():
            row[name] = round(statistics.fmean(values), 4)
            if len(values) == len(SEEDS):
                row[f"{name}_half"] = round(T_OF_THREE * statistics.stdev(values) / len(values) ** 0.5, 4)
        made.append(row)
    return made


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference of the students' KL to the teacher between two sweeps."""
    return max(
        abs(metrics(place)["kl_to_teacher"] - metrics(other / "runs" / place.name)["kl_to_teacher"])
        for place in (one / "runs").iterdir()
    )


def measure(place: Path, small: bool) -> dict[str, Any]:
    """All sweeps."""
    straight, broken, alone = (tree(place / name, small) for name in ("straight", "interrupted", "alone"))
    stops = (
        {"KD-seed-1": signal.SIGINT}
        if small
        else {"KD-seed-3": signal.SIGINT, "DistiLLM-2-seed-1": signal.SIGKILL}
    )
    assert run(place, straight) == 0
    told = interrupted(place, broken, stops)
    one, other = (outcome(place / name) for name in ("straight", "interrupted"))
    differing = [name for name in one if one[name] != other.get(name)]
    found: dict[str, Any] = {
        "interruptions": told,
        "compared": len(one),
        "differing": differing,
        "teacher tokens, shared": tokens_of_the_teacher(place / "straight"),
    }
    if not small:
        assert run(place, {**alone, "share": {"text": False, "signal": False}}) == 0
        found["teacher tokens, not shared"] = tokens_of_the_teacher(place / "alone")
        found["largest difference of KL, shared or not"] = largest_difference(
            place / "straight", place / "alone"
        )
    return {**found, "rows": table(place / ("straight" if small else "alone"))}


def plot(found: dict[str, Any], path: Path) -> None:
    """Quality against the seconds of a run, with the Pareto line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from stillhouse.report.tradeoffs import pareto

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, (name, label, lower) in zip(
        panels,
        (("rouge_l", "ROUGE-L", False), ("kl_to_teacher", "KL to the teacher (nats per token)", True)),
        strict=True,
    ):
        points = [(row["seconds"], row[name]) for row in found["rows"]]
        line = pareto(points, lower_x=True, lower_y=lower)
        axes.plot(*zip(*line, strict=True), color="grey", linewidth=1, zorder=0)
        for row in found["rows"]:
            spread = {"xerr": row.get("seconds_half"), "yerr": row.get(f"{name}_half")}
            axes.errorbar(row["seconds"], row[name], **spread, marker="o", capsize=3, label=row["method"])
        axes.set_xlabel("seconds of the run")
        axes.set_ylabel(label)
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the sweeps, and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two methods, one seed, interrupted once")
    parser.add_argument("--output", type=Path, help="the JSON file to write, and a plot beside it")
    parser.add_argument("--folder", type=Path, help="where the sweeps go; default: a temporary folder")
    options = parser.parse_args()
    # a shell's background job ignores SIGINT, and so would everything that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as temporary:
        place = (options.folder or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        measured = measure(place, options.small)
    found = {**result([], seeds=list(SEEDS), threads=1), **measured}
    print(json.dumps(found, indent=2))
    if options.output is not None:
        save(options.output, found)
        plot(found, options.output.with_suffix(".svg"))
    if found["differing"]:
        raise SystemExit(f"not as the straight sweep: {', '.join(found['differing'])}")


if __name__ == "__main__":
    main()
