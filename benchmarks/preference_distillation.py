"""DPO, SimPER, DCKD, ADPA and AlignDistil from one fine-tuned student: held-out pairs, ROUGE-L, KL, length.

Pairs and measures are those of benchmarks/preferences.py, the student that of its warm start. Two teachers
come from the demonstration's: by DPO on the pairs, and by DPO on the swapped pairs; its own is the reference.

    python benchmarks/preference_distillation.py            # about 9 minutes on one thread
    python benchmarks/preference_distillation.py --small    # a check that it runs; writes nothing

Writes benchmarks/results/preference_distillation.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from preferences import DEMO, SMALL, Size, measure, measured, pairs_of, row, run

from stillhouse import recipes
from stillhouse.runs.execute import execute
from stillhouse.runs.resolve import resolve

RESULT = Path(__file__).parent / "results" / "preference_distillation.json"
TEACHER = f"{DEMO}/teacher"
SHORT = {"max_steps": 1, "batch_size": 4, "micro_batch_size": 4}
TRAIN = {"epochs": 2.0, "batch_size": 32, "micro_batch_size": 16, "lr": 1e-3}
DPO = {"lr": 2e-4, "epochs": 1.0, "batch_size": 16, "micro_batch_size": 16}
"""How the two teachers are trained."""
QUIET = {"validate_every": "never", "save_every": "never"}


@dataclass(frozen=True)
class Method:
    """What a row of the table is trained by."""

    recipe: str
    start: str = "student"
    """The system whose student it starts from."""
    further: Mapping[str, str] = field(default_factory=dict)
    """Its further teachers, by name."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What it has otherwise than the recipe."""


METHODS = {
    "DPO": Method("dpo", further={"reference": "student"}, changes={"train": {"lr": 3e-4}}),
    "SimPER": Method("simper", changes={"train": {"lr": 3e-4}}),
    "DCKD": Method("dckd"),
    "ADPA": Method("adpa", further={"reference": TEACHER}),
    "ADPA+ (DCKD, then ADPA)": Method("adpa", start="DCKD", further={"reference": TEACHER}),
    "AlignDistil, off-policy": Method("aligndistil_off_policy", further={"reverse": "reverse"}),
    "AlignDistil, on-policy": Method("aligndistil", further={"reverse": "reverse"}),
    "AlignDistil, off-policy, b2 = 1": Method(
        "aligndistil_off_policy",
        further={"reverse": "reverse"},
        changes={"objective": {"extrapolation": 1.0}},
    ),
}


def live(path: str | Path) -> dict[str, Any]:
    """A teacher in memory."""
    return {"kind": "live", "path": str(path), "dtype": "float32"}


def trained(folder: Path, tree: Mapping[str, Any]) -> Path:
    """One run; nothing if it is there already."""
    if not (folder / "student").is_dir():
        data = {"template": "plain", "max_prompt": 128, "max_response": 96, **tree["data"]}
        execute(resolve({**tree, "data": data, "output": {"folder": str(folder), "report": False}}))
    return folder


def dpo_teacher(folder: Path, pairs: Path, small: bool, swap: bool) -> Path:
    """The demonstration's teacher after DPO."""
    return trained(
        folder,
        {
            "name": folder.name,
            "recipe": "dpo",
            "student": {"path": TEACHER},
            "teachers": {"reference": live(TEACHER)},
            "data": {"train": str(pairs)},
            "responses": {"swap": swap},
            "train": {**DPO, **QUIET, **(SHORT if small else {})},
            "evaluate": {"before": False},
        },
    )


def method(
    folder: Path, name: str, seed: int, start: Path, files: Mapping[str, Path], size: Size, small: bool
) -> Path:
    """A student of one seed after one method."""
    one = METHODS[name]
    changes, short = dict(one.changes), SHORT if small else {}
    train = {**TRAIN, **QUIET, "seed": seed, **changes.pop("train", {}), **short}
    asked = recipes.find(one.recipe).teachers
    main = {"teacher": live(files["dpo"])} if "main" in asked else {}
    task = {"kind": "preference", "data": str(files["held-out"]), "reference": str(files["student"])}
    return trained(
        folder,
        {
            "name": folder.name,
            "recipe": one.recipe,
            "student": {"path": str(start / "student")},
            **main,
            "teachers": {key: live(files.get(path, path)) for key, path in one.further.items()},
            "data": {"train": str(files["pairs"])},
            **changes,
            "train": train,
            "evaluate": {
                "before": name == next(iter(METHODS)),
                "teacher": False,
                "data": f"{DEMO}/data/eval.jsonl",
                "limit": size.held_out,
                "tasks": [task],
            },
        },
    )


def table(folder: Path, size: Size, small: bool) -> list[dict[str, Any]]:
    """A row for each method."""
    files = {
        name: folder / f"{name}.jsonl"
        if (folder / f"{name}.jsonl").is_file()
        else pairs_of(folder, name, file, prompts)
        for name, file, prompts in (
            ("pairs", "train.jsonl", size.prompts),
            ("held-out", "eval.jsonl", size.held_out),
        )
    }
    files["dpo"] = dpo_teacher(folder / "dpo", files["pairs"], small, swap=False)
    files["reverse"] = dpo_teacher(folder / "reverse", files["pairs"], small, swap=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("student", *METHODS)}
    student = run("warm-start", folder / "warm-start", **(size.warm_start or {}))
    files["student"] = student
    for seed in size.seeds:
        systems = {"student": student}
        for name in METHODS:
            place = folder / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name).strip('-')}-{seed}"
            start = systems[METHODS[name].start]
            systems[name] = method(place, name, seed, start, files, size, small)
            found[name].append(measured(place, "student-after"))
            if name == next(iter(METHODS)):
                found["student"].append(measured(place, "student-before"))
            print(name, seed, found[name][-1], flush=True)
    return [row(name, one) for name, one in found.items()]


def main() -> None:
    """Measure, print, and write the result."""

    def rows_of(folder: Path, small: bool) -> list[dict[str, Any]]:
        size = replace(SMALL, seeds=(1, 2)) if small else Size(prompts=200, held_out=80)
        return table(folder, size, small)

    settings = {"teachers": DPO, "train": TRAIN}
    measure(rows_of, RESULT, __doc__, settings=settings)


if __name__ == "__main__":
    main()
