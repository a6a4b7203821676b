"""What `stillhouse check --measure` says that a whole run takes, and what `stillhouse run` then takes.

Each case is distilled from the embedded teacher, which is in work, with validation, checkpoints, evaluation
of student and teacher, export and report. The prediction is that of `check --measure`, without its probe,
which it does not need. The truth is the time from the start of the command to its end, so that nothing is
left out: by the clock, and of the processor, which holds where other programs run too.

    python benchmarks/wall_time.py             # minutes; one thread
    python benchmarks/wall_time.py --only csd  # cases with this in their names; the others keep their rows
    python benchmarks/wall_time.py --small     # a run of 4 steps; writes nothing

Writes benchmarks/results/wall_time.json, case by case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import yaml
from _result import result, save
from estimates import TOKENIZER, llama

from stillhouse.runs.estimate import run_size
from stillhouse.runs.measure import measure, spent_on_processes
from stillhouse.runs.resolve import resolve
from stillhouse.runs.run_watch import CLOCK, PROCESSOR, minus
from stillhouse.runs.wall_time import STARTING, Range, exactly, time_of_run, whole

RESULT = Path(__file__).parent / "results" / "wall_time.json"
RUN = Path(__file__).parent / "_timed_run.py"
DEMO = "package:stillhouse/demo"
TINY = {"model": llama(64, 2, 4096), "steps": 60, "batch": 16, "limit": 64}
CASES: dict[str, dict[str, Any]] = {
    "kd, 0.6M": {**TINY, "recipe": "kd", "batch": 32, "limit": None},
    "gkd, 0.6M": {**TINY, "recipe": "gkd"},
    "csd, 0.6M": {**TINY, "recipe": "csd"},
    "kd, 9M": {**TINY, "recipe": "kd", "model": llama(256, 6, 8192), "steps": 40},
}
TRY: dict[str, Any] = {**TINY, "recipe": "kd", "steps": 4, "batch": 8, "limit": 8}


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a run of 4 steps; writes nothing")
    parser.add_argument("--only", help="cases with this in their names; the others keep their rows")
    options = parser.parse_args()
    if options.small:
        print(json.dumps(case("try", TRY)))
        return
    only = options.only or ""
    before = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if only and RESULT.exists() else []
    rows: dict[str, dict[str, Any]] = {row["case"]: row for row in before}
    for name in [name for name in CASES if only in name]:
        rows[name] = case(name, CASES[name])
        print(json.dumps(rows[name]), flush=True)
        save(RESULT, result([*rows.values()], device="CPU", command="python benchmarks/wall_time.py"))


def case(name: str, of: dict[str, Any]) -> dict[str, Any]:
    """Prediction and truth of one run, in seconds."""
    with tempfile.TemporaryDirectory() as place:
        file, times = Path(place) / "run.yaml", Path(place) / "times.json"
        file.write_text(yaml.safe_dump(tree(of, Path(place) / "run")), encoding="utf-8")
        config = resolve(file).config
        size, steps = run_size(config), measure(config)
        began = spent_on_processes()
        subprocess.run(
            [sys.executable, "-P", str(RUN), str(file), str(times)], check=True, stdout=subprocess.DEVNULL
        )
        took = minus(spent_on_processes(), began)
        taken = json.loads(times.read_text(encoding="utf-8"))
    return {
        "case": name,
        "student parameters": size.student.parameters,
        "steps": size.facts["steps"],
        **{
            what: compared(
                time_of_run(config, size, phases), {n: one[by] for n, one in taken.items()}, took[by]
            )
            for by, what, phases in (
                (CLOCK, "clock", steps.run),
                (PROCESSOR, "processor", steps.run_processor),
            )
        },
        "share of the processor": {
            "two steps": round(steps.share_of_processor, 2),
            "run": round(took[PROCESSOR] / took[CLOCK], 2),
        },
    }


def compared(said: dict[str, Range | None], taken: dict[str, float], took: float) -> dict[str, Any]:
    """Each phase and the whole, as predicted and as measured."""
    run_took = taken.pop("run")
    found = {STARTING: took - run_took, **taken, "all else": run_took - sum(taken.values())}
    together = whole(said)
    return {
        "predicted": rounded(together, 1.0, 1),
        "measured": round(took, 1),
        "ratio": rounded(together, took, 2),
        "phases": {
            phase: {
                "predicted": rounded(said.get(phase) or exactly(0.0), 1.0, 1),
                "measured": round(seconds, 1),
            }
            for phase, seconds in found.items()
        },
    }


def rounded(ends: Range, of: float, digits: int) -> list[float]:
    """Both ends over a number of seconds."""
    return [round(end / of, digits) for end in (ends.low, ends.high)]


def tree(of: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The run of a case."""
    half = of["steps"] // 2
    return {
        "recipe": of["recipe"],
        "teacher": {"kind": "live", "path": TOKENIZER},
        "student": {"from_config": of["model"], "tokenizer": TOKENIZER},
        "data": {
            "train": {"kind": "jsonl", "path": f"{DEMO}/data/train.jsonl", "labelled": 200},
            "valid": f"{DEMO}/data/dev.jsonl", "template": {"kind": "plain"}, "no_response": "drop",
            "max_prompt": 128, "max_response": 96,
        },
        "train": {
            "max_steps": of["steps"], "batch_size": of["batch"], "micro_batch_size": of["batch"],
            "validate_every": half, "save_every": half,
        },
        "evaluate": {"data": f"{DEMO}/data/eval.jsonl", "limit": of["limit"], "valid_limit": of["limit"]},
        "output": {"folder": str(folder)},
    }  # fmt: skip


if __name__ == "__main__":
    main()
