"""What training on preferences after distillation changes: accuracy on held-out pairs, ROUGE-L, KL, length.

The task is E2E NLG with the demonstration's teacher. Its samples (4 a prompt, temperature 1) are ranked by
ROUGE-L against the references; best and worst are the pairs, those of the evaluation from its own prompts.
Every method starts from the same distilled student of a seed. A further method is one entry of `METHODS`.
DPO runs twice, one after the other: as the recipe `dpo`, and with the steps of TRL's DPOTrainer over the same
models, token ids and order.

    python benchmarks/preferences.py            # about 8 minutes on one thread
    python benchmarks/preferences.py --small    # a check that it runs; writes nothing

Writes benchmarks/results/preferences.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from _result import result, save

from stillhouse.config import Layer, Layered
from stillhouse.evaluate.preference_files import pairs_of_files
from stillhouse.evaluate.rankers import REGISTRY as RANKERS
from stillhouse.files import locate
from stillhouse.runs.execute import execute
from stillhouse.runs.generate import GenerateArguments, generate
from stillhouse.runs.resolve import resolve

DEMO = "package:stillhouse/demo"
RESULT = Path(__file__).parent / "results" / "preferences.json"
SAMPLES = 4
METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"recipe": "dpo", "objective": {"beta": 0.1}},
    "DPO by TRL": {"recipe": "dpo", "objective": {"beta": 0.1}},
    "SimPER": {"recipe": "simper"},
}
"""By name: what the run after the distillation has otherwise than its recipe."""
OF_TRL = "DPO-by-TRL"
"""How the folders of runs begin whose steps TRL takes."""
TRAIN = {
    "epochs": 2.0, "batch_size": 32, "micro_batch_size": 16, "lr": 3e-4, "weight_decay": 0.0,
    "validate_every": "never", "save_every": "never",
}  # fmt: skip
MEASURES = ("preference_accuracy", "reward_accuracy", "rouge_l", "kl_to_reference", "mean_length")


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    prompts: int = 300
    held_out: int = 120
    seeds: tuple[int, ...] = (1, 2, 3)
    warm_start: Mapping[str, Any] | None = None
    distillation: Mapping[str, Any] | None = None
    preference: Mapping[str, Any] | None = None


SMALL = Size(
    prompts=8,
    held_out=4,
    seeds=(1, 2),
    warm_start={"train.max_steps": 2},
    distillation={"train.max_steps": 2, "train.batch_size": 4, "train.micro_batch_size": 4},
    preference={"max_steps": 1, "batch_size": 4, "micro_batch_size": 4},
)


def pairs_of(folder: Path, name: str, file: str, prompts: int) -> Path:
    """Pairs of the teacher's samples for the first prompts of a file."""
    config = resolve(
        {
            "student": {"path": f"{DEMO}/teacher"},
            "teacher": {"kind": "live", "path": f"{DEMO}/teacher"},
            "data": {
                "train": {"path": f"{DEMO}/data/{file}", "kind": "jsonl"},
                "template": "plain", "max_prompt": 128, "max_response": 96,
            },
            "objective": "forward_kl",
        }
    ).config  # fmt: skip
    written = folder / f"{name}.samples.jsonl"
    generate(config, GenerateArguments(written, "teacher", None, SAMPLES, 1, prompts))
    output = folder / f"{name}.jsonl"
    result = pairs_of_files([written], RANKERS.parse("rouge_l"), output)
    print(f"{name}: {result.pairs} pairs, margin {result.mean_margin:.1f}; left out {dict(result.left_out)}")
    return output


def stage_tree(stage: str) -> dict[str, Any]:
    """A stage of the quickstart as a run of its own."""
    chain = Layer.read(locate(f"{DEMO}/quickstart.yaml")).values
    shared = {name: value for name, value in chain.items() if name not in ("name", "stages")}
    own = {"name": stage, **chain["stages"][stage]}
    return Layered.merged(*(Layer.of(values, DEMO) for values in (shared, own))).values


def run(stage: str, folder: Path, **changes: Any) -> Path:
    """One run of the demonstration's configurations; nothing if it is there already."""
    values = {"output.folder": str(folder), "output.report": False, **changes}
    if not (folder / "student").is_dir():
        execute(resolve(stage_tree(stage), values))
    return folder


def distilled(folder: Path, seed: int, start: Path, size: Size, held_out: Path) -> Path:
    """A student of one seed after distillation."""
    changes = {
        "student.path": str(start / "student"),
        "train.seed": seed,
        "train.validate_every": "never",
        "train.save_every": "never",
        "evaluate.before": seed == size.seeds[0],  # the start is the same for all
        "evaluate.limit": size.held_out,
        "evaluate.tasks": [{"kind": "preference", "data": str(held_out)}],
        **(size.distillation or {}),
    }
    return run("kd", folder, **changes)


def preferring(
    folder: Path, seed: int, start: Path, size: Size, files: tuple[Path, Path], method: Mapping[str, Any]
) -> Path:
    """A distilled student of one seed after one method on the pairs; measured before as well as after."""
    pairs, held_out = files
    task = {"kind": "preference", "data": str(held_out), "reference": str(start)}
    tree = {
        **stage_tree("kd"),
        **method,
        "name": folder.name,
        "student": {"path": str(start)},
        "teachers": {"reference": {"kind": "live", "path": str(start)}} if method["recipe"] == "dpo" else {},
        "train": {**TRAIN, "seed": seed, **(size.preference or {})},
        "evaluate": {"teacher": False, "data": f"{DEMO}/data/eval.jsonl", "limit": size.held_out,
                     "tasks": [task]},
        "output": {"folder": str(folder), "report": False},
    }  # fmt: skip
    tree["data"] = {**tree["data"], "train": str(pairs), "valid": None}
    if not (folder / "student").is_dir():
        if folder.name.startswith(OF_TRL):
            from _trl_dpo import run_by_trl

            run_by_trl(resolve(tree), folder)
        else:
            execute(resolve(tree))
    return folder


def measured(folder: Path, system: str) -> dict[str, float]:
    """What is reported of one system: on the held-out prompts and on the pairs."""
    found: dict[str, float] = {}
    for file in (f"{system}.json", f"{system}.preference.json"):
        metrics = json.loads((folder / "evaluation" / file).read_text(encoding="utf-8"))["metrics"]
        found = {**metrics, **found}  # ROUGE-L and lengths of the held-out prompts stay
    return {name: found[name] for name in MEASURES if name in found}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def row(name: str, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """A row of the table."""
    means: dict[str, Any] = {"system": name, "seeds": len(found)}
    for measure in MEASURES:
        values = [one[measure] for one in found if measure in one]
        if len(values) == len(found):
            means[measure], means[f"{measure}_se"] = mean_and_error(values)
    return means


def table(folder: Path, size: Size, methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All rows: the student, the distilled student, and that after each method."""
    pairs = pairs_of(folder, "pairs", "train.jsonl", size.prompts)
    held_out = pairs_of(folder, "held-out", "eval.jsonl", size.held_out)
    start = run("warm-start", folder / "warm-start", **(size.warm_start or {}))
    found: dict[str, list[dict[str, float]]] = {"student": [], "distilled": []}
    for seed in size.seeds:
        student = distilled(folder / f"distilled-{seed}", seed, start, size, held_out)
        if seed == size.seeds[0]:
            found["student"].append(measured(student, "student-before"))
        for name, method in methods.items():
            place = folder / f"{name.replace(' ', '-')}-{seed}"
            preferring(place, seed, student, size, (pairs, held_out), method)
            if name == next(iter(methods)):
                found["distilled"].append(measured(place, "student-before"))
            found.setdefault(f"distilled + {name}", []).append(measured(place, "student-after"))
            print(name, seed, measured(place, "student-after"), flush=True)
    return [row(name, one) for name, one in found.items()]


def main() -> None:
    """Measure, print, and write the result."""
    measure(
        lambda folder, small: table(folder, SMALL if small else Size(), METHODS),
        RESULT,
        __doc__,
        methods=METHODS,
    )


def measure(
    rows_of: Callable[[Path, bool], list[dict[str, Any]]],
    output: Path,
    description: str | None,
    **facts: Any,
) -> None:
    """Run a benchmark of this kind from the command line.

    Args:
        rows_of: a folder for the runs, and whether it is only a check, to the rows of the table.
        output: the JSON file, called as the script.
        description: of the script.
        facts: what the file says besides.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a check that it runs; writes nothing")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on with those that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = rows_of(folder, arguments.small)
    for one in rows:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in one.items()})
    if not arguments.small:
        facts["command"] = f"python benchmarks/{output.stem}.py"  # wherever its runs were kept
        save(output, result(rows, ["transformers", "trl"], **facts))


if __name__ == "__main__":
    main()
