"""What a GPU makes of it: objectives, optimiser steps, writing, the papers' own pair, the test-suite.

    python benchmarks/gpu.py                 # on a GPU: at most eight minutes
    python benchmarks/gpu.py --small         # on a CPU, seconds: a check that it runs
    python benchmarks/gpu.py --only step     # one stage

Stages run in order of value, each in a process of its own with a limit of time. A row is printed as soon as
it is measured; the results are written after each stage, to benchmarks/results/gpu.json on a GPU and nowhere
else unless --output says where. What fails (no memory, no kernel) or is not installed is a row that says so.

- objectives: 8,192 response rows at V = 151,936, 128,256 and 50,257; value and gradients of hidden states and
  head. `over_floor` is the time over that of the four bare products in bfloat16; `gradient_error` is relative
  to float64 over the same operands; `peak_gib` is above the operands. Peers: TRL's kernel, Liger, and full
  logits as released code forms them.
- step: a 0.5B student (fp32 weights, bfloat16 autocast) and a 3B teacher (bfloat16) of random weights, 16
  prompts of 128 to 256 and responses of 256 to 512 tokens; forward KL, against TRL's GKD.
- writing: 32 rows, 256 new tokens, against `generate` and `generate_batch`.
- paper: GPT-2 XL teaches GPT-2, batch 8, prompts and responses as long as Dolly's; what a student writes with
  random weights never ends before 256 tokens, the most expensive case.
- tests: the suite, with the names of the tests that fail.

A machine without network takes packages along as wheels. Once, where there is a network and the same Python:

    pip download -c constraints.txt --only-binary :all: -d wheels datasets pydantic typer rich PyYAML \\
        Jinja2 matplotlib rouge-score psutil pytest hypothesis
    pip download --only-binary :all: --no-deps -d wheels trl==1.16.0 liger-kernel

and there `python benchmarks/gpu.py --wheels wheels`: what is not installed yet is, into a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _result import result, save

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "gpu.json"
PACKAGES = ("torch", "transformers", "triton", "trl", "liger-kernel", "accelerate")
LIMITS = {"objectives": 110, "step": 130, "writing": 70, "paper": 90, "tests": 300}
"""Seconds of each stage at most, in order of value."""
TOTAL = 480
"""Seconds of all stages."""
END = object()


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--only", choices=LIMITS, action="append", help="these stages; default: all")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install from")
    parser.add_argument("--output", type=Path, help="where the results go; default: see above")
    parser.add_argument("--seconds", type=int, default=TOTAL, help=f"of all stages; default: {TOTAL}")
    options = parser.parse_args()
    for path in (HERE.parent / "src", HERE):
        sys.path.insert(0, str(path))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with tempfile.TemporaryDirectory(prefix="stillhouse-gpu-") as scratch:
        if options.wheels is not None:
            install(options.wheels, Path(scratch) / "packages")
        run_stages(options, Path(scratch))


def run_stages(options: argparse.Namespace, scratch: Path) -> None:
    """All that were asked for, as far as the time goes."""
    context = multiprocessing.get_context("fork" if options.small else "spawn")
    if options.small:
        for module in ("_gpu_objectives", "_gpu_training", "_gpu_writing", "trl.experimental.gkd"):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(module)  # once for all forks
    end = time.monotonic() + options.seconds * (10 if options.small else 1)  # a CPU may be busy
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in options.only or LIMITS:
        limit = min(LIMITS[name] * (10 if options.small else 1), end - time.monotonic())
        if limit <= 0:
            say(name, {"skipped": f"the {options.seconds} seconds are over"})
            continue
        rows[name] = []
        for row in stage_rows(context, name, options.small, scratch, limit):
            say(name, row)
            rows[name].append(row)
        write(options, rows)


def stage_rows(context: Any, name: str, small: bool, scratch: Path, limit: float) -> Iterator[dict[str, Any]]:
    """The rows of a stage in a process of its own; a last row says if it was stopped or died."""
    start = time.monotonic()
    rows = context.Queue()
    process = context.Process(target=child, args=(name, small, str(scratch), rows))
    process.start()
    problem = None
    while problem is None:
        try:
            row = rows.get(timeout=0.5)
            if row is None:
                break
            yield row
        except queue.Empty:
            if time.monotonic() - start > limit:
                problem = f"stopped after its {limit:.0f} seconds"
            elif not process.is_alive():
                problem = f"its process ended with {process.exitcode}"
    if process.is_alive() and problem is not None and process.pid is not None:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    yield {"stage_seconds": round(time.monotonic() - start, 1), **({"failed": problem} if problem else {})}


def child(name: str, small: bool, scratch: str, rows: Any) -> None:
    """One stage; None after its last row."""
    os.setsid()  # with what it starts, such as tests, it is stopped as one
    import torch
    import transformers
    from _gpu_models import Place, attempt

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    place = Place(device, Path(scratch), small)
    broken: dict[str, Any] = {}
    with attempt(broken):
        for row in stage_of(name)(place):
            rows.put(row)
    if broken:
        rows.put(broken)
    rows.put(None)
    rows.close()
    rows.join_thread()


def stage_of(name: str) -> Any:
    """What makes the rows of a stage."""
    if name == "objectives":
        from _gpu_objectives import stage
    elif name == "step":
        from _gpu_training import step as stage
    elif name == "paper":
        from _gpu_training import paper as stage
    elif name == "writing":
        from _gpu_writing import stage
    else:
        from _gpu_tests import stage
    return stage


def say(stage: str, row: dict[str, Any]) -> None:
    """One line."""
    print(f"{stage}: " + "  ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def write(options: argparse.Namespace, rows: dict[str, list[dict[str, Any]]]) -> None:
    """All rows so far with what is needed to repeat them, in one atomic file."""

    device = device_name()
    target = options.output or (RESULT if device != "cpu" and not options.small else None)
    if target is None:
        return
    threads = os.cpu_count() if device != "cpu" else 1
    save(target, result(rows, PACKAGES, device=device, threads=threads))


@functools.cache
def device_name() -> str:
    """The name of the card, asked in another process: this one must not open it."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def version(name: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def install(wheels: Path, target: Path) -> None:
    """Unpack the wheels of packages that are not installed, for this process and those it starts."""
    known = {one.metadata["Name"].lower().replace("_", "-") for one in importlib.metadata.distributions()}
    names = {file: file.name.split("-")[0].lower().replace("_", "-") for file in wheels.glob("*.whl")}
    new = [str(file) for file, name in sorted(names.items()) if name not in known]
    if not new:
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(target), *new], check=True)
    sys.path.append(str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(target)]))
    print(json.dumps({"installed": sorted(Path(file).name for file in new)}), flush=True)


if __name__ == "__main__":
    main()
