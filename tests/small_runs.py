"""Whole runs that take about a second, in processes of their own, killed wherever a test wants.

A child dies by SIGKILL at a chosen system event: Python announces each opening, renaming and deleting of a
file to an audit hook, and nothing has to be replaced.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import stillhouse
from stillhouse import recipes
from stillhouse.files import write_jsonl
from tests.children import end, ranks, start
from tests.devices import same, same_tensors

Event = Callable[[str, str], bool]
"""(name of the event, its file) -> whether to die now."""

TEACHER = "package:stillhouse/demo/teacher"
STUDENT = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
"""A GPT-2, because it has dropout on embeddings, attention and residuals."""


def write_data(folder: Path, rows: int = 18, valid: int = 4) -> None:
    source = Path(stillhouse.__file__).parent / "demo" / "data"
    for name, count, file in (("train", rows, "train.jsonl"), ("valid", valid, "dev.jsonl")):
        lines = (source / file).read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if name == "train":
            write_jsonl(folder / "pairs.jsonl", pairs_of([json.loads(line) for line in lines]))
            write_jsonl(folder / "chains.jsonl", chains_of([json.loads(line) for line in lines]))
    rows = [{"text": json.loads(line)["outputs"][0]} for line in lines]
    write_jsonl(folder / "text.jsonl", rows)


def pairs_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row's first reference is preferred to that of another row."""
    answers = [row["outputs"][0] for row in rows]
    return [
        {"prompt": row["prompt"], "chosen": answers[place], "rejected": answers[(place - 5) % len(answers)]}
        for place, row in enumerate(rows)
    ]


def chains_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row's first reference, with one of its facts as the reasoning before it."""
    return [
        {"prompt": row["prompt"], "response": row["outputs"][0], "reasoning": row["prompt"].split("[")[1][:8]}
        for row in rows
    ]


def _file(recipe: str | None) -> str:
    """The file of `write_data` with the rows that a recipe trains on."""
    needed = frozenset() if recipe is None else recipes.find(recipe).requirements.data
    files = {"rejected": "pairs.jsonl", "reasoning": "chains.jsonl"}
    return next((file for need, file in files.items() if need in needed), "train.jsonl")


def tree(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """9 optimiser steps over 18 prompts: epochs of 5 steps, the last of them half as large as the others."""
    train = {
        "max_steps": 9, "batch_size": 4, "micro_batch_size": 2, "lr": 3e-3, "log_every": 2,
        "save_every": 2, "validate_every": 3, "validate_rouge": False,
    }  # fmt: skip
    return {
        "name": name,
        "student": {"tokenizer": TEACHER, "from_config": STUDENT},
        "teacher": {"kind": "live", "path": TEACHER},
        "data": {
            "train": str(folder / _file(changes.get("recipe"))),
            "valid": str(folder / "valid.jsonl"),
            "template": {"kind": "plain"},
            "max_prompt": 96,
            "max_response": 10,
            **changes.pop("data", {}),
        },
        "evaluate": {"before": False, "teacher": False, "sampling": {"max_tokens": 8}},
        "output": {"folder": str(folder / name), "report": False},
        **changes,
        "train": {**train, **changes.get("train", {})},
    }


def tree_of_recipe(folder: Path, name: str, other: str = TEACHER, **changes: Any) -> dict[str, Any]:
    """A `tree` of that recipe with the teachers that it asks; all but the main one are the model `other`."""
    made = tree(folder, name, recipe=name, **changes)
    asked = recipes.find(name).teachers
    made["teachers"] = {one: {**made["teacher"], "path": other} for one in asked if one != "main"}
    if "main" not in asked:
        del made["teacher"]
    return made


def in_child(
    tree: dict[str, Any],
    resume: bool = False,
    die: Event | None = None,
    by: signal.Signals = signal.SIGKILL,
    env: Mapping[str, str] | None = None,
) -> int:
    """Run a configuration in a process of its own; its exit code, negative for a signal."""
    return end(start(run, tree, resume, die, by, env=env))


def in_two(tree: dict[str, Any], resume: bool = False, die: Event | None = None) -> list[int]:
    """Run a configuration in two processes on the CPU (gloo); both die at one event. Their exit codes."""
    return ranks(2, run, tree, resume, die, seconds=120)


def run(
    tree: dict[str, Any],
    resume: bool = False,
    die: Event | None = None,
    by: signal.Signals = signal.SIGKILL,
) -> None:
    """Run a configuration, and end this process with 1 if it fails."""
    if die is not None:
        announce(die, by)
    try:
        stillhouse.run(tree, resume=resume)
    except BaseException:  # noqa: BLE001  (the child must end here, whatever it was)
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def announce(die: Event, by: signal.Signals) -> None:
    """Ask `die` at each event of this process from now on, and send it the signal where it says so."""
    sys.addaudithook(lambda event, args: _maybe_die(event, args, die, by))


def _maybe_die(event: str, args: tuple[Any, ...], die: Event, by: signal.Signals) -> None:
    if event not in ("open", "os.rename", "os.remove", "shutil.rmtree"):
        return
    file = args[1] if event == "os.rename" else args[0]
    if isinstance(file, str | os.PathLike) and die(event, str(file)):
        os.kill(os.getpid(), by)


@dataclass
class nth:
    """The `count`-th time that `event` happens to a file whose path ends so."""

    count: int
    event: str
    ending: str

    def __call__(self, event: str, file: str) -> bool:
        if event != self.event or not file.endswith(self.ending):
            return False
        self.count -= 1
        return self.count == 0


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on interruptions."""
    last = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    evaluation = json.loads((folder / "evaluation" / "student-after.json").read_text(encoding="utf-8"))
    return {
        "weights": load_file(folder / "student" / "model.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(last / "scheduler.pt", weights_only=True),
        "state": torch.load(last / "stillhouse.pt", weights_only=True),
        "rows": rows_of(folder),
        "evaluation": evaluation["metrics"],
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a metrics log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two outcomes differ, on a CPU by a bit; left out are times and the tokens of each phase, which an
    interrupted run may write or read twice."""
    if "seconds" in path or "per_second" in path or "tokens/" in path:
        return []
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if same_tensors(one, other) else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other}]
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            d
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for d in differences(a, b, f"{path}/{i}")
        ]
    alike = same(one) if isinstance(one, float) else one
    return [] if alike == other else [f"{path}: {one!r} != {other!r}"]
