"""Stages of gpu.py: optimiser steps of our runs and of TRL's trainer; the papers' own pair."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _trl_gkd
import torch
from _gpu_models import Lengths, Place, attempt, saved, write_rows
from transformers import PrinterCallback, TrainerCallback

from stillhouse.core.distributed import Ranks
from stillhouse.models.sharding import TrainedStudent
from stillhouse.runs.build import assemble, pack_where_possible
from stillhouse.runs.execute import make_trainer
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.make_step import make_step
from stillhouse.runs.resolve import resolve
from stillhouse.runs.training_arguments import training_arguments

GENERAL = Lengths(prompt=(128, 256), response=(256, 512))
DOLLY = Lengths((36, 256), (4, 256), log_prompt=(4.29, 0.87), log_response=(3.59, 1.04))
"""Tokens of GPT-2 in 3,000 rows of databricks-dolly-15k with Alpaca's words around them."""
PHASES = ("generate", "teacher", "student", "backward", "optimiser")


class Clock(TrainerCallback):
    """When each step ended; memory and what the step measured itself count from the second one on."""

    def __init__(self, place: Place, step: Any = None) -> None:
        self.place, self.step, self.ends = place, step, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After all that is queued."""
        if not self.ends:
            self.place.forget()
            if self.step is not None:
                self.step.metrics.row()
        self.ends.append(self.place.now())

    def row(self, alike: bool) -> dict[str, Any]:
        """Seconds a step: the median where steps are alike, else the mean."""
        spent = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        middle = statistics.median if alike else statistics.fmean
        found: dict[str, Any] = {"seconds_per_step": round(middle(spent), 4), "steps": len(spent)}
        if self.step is not None:
            told = self.step.metrics.row()
            seconds = {name: told.get(f"seconds/{name}", 0.0) / len(spent) for name in PHASES}
            found |= {f"{name}_seconds": round(value, 4) for name, value in seconds.items() if value}
            found["student_share"] = round(told.get("responses/student", 0.0), 2)
        return found | self.place.peak()


def tree(place: Place, name: str, student: Path, teacher: Path, rows: Path, **more: Any) -> dict[str, Any]:
    """A run of ours over saved models; `train` and `data` are laid over."""
    train = {
        "lr": 1e-5, "precision": "bfloat16" if place.cuda else "float32", "log_every": 1000,
        "save_every": "never", "validate_every": "never", **more.pop("train", {}),
    }  # fmt: skip
    return {
        "name": name,
        "student": {"path": str(student), "dtype": "float32"},
        "teacher": {"kind": "live", "path": str(teacher)},
        "data": {"train": str(rows), "template": {"kind": "plain"}, **more.pop("data", {})},
        "evaluate": {"before": False, "teacher": False},
        "output": {"folder": str(place.folder / name), "report": False},
        "train": train,
        **more,
    }


class Loaded:
    """Two models and their rows, loaded once for all runs that train on them in turn."""

    def __init__(self, place: Place, config: dict[str, Any]) -> None:
        self.place = place
        self.parts = assemble(resolve(config).config)

    def ours(self, config: dict[str, Any], alike: bool = True) -> dict[str, Any]:
        """Train as the configuration says, without evaluation and export."""
        parts = replace(self.parts, config=resolve(config).config)
        pack_where_possible(parts)
        folder = RunFolder(Path(config["output"]["folder"]))
        arguments = training_arguments(parts.config, folder.checkpoints)
        step = make_step(parts, folder, Ranks.of(arguments))
        clock = Clock(self.place, step)
        return self._trained(
            make_trainer(parts, step, TrainedStudent(parts.student), arguments, [clock]), clock, alike
        )

    def trl(self, config: dict[str, Any], **options: Any) -> dict[str, Any]:
        """TRL's GKD over the same models, rows and micro-batches."""
        run, folder = resolve(config).config, Path(config["output"]["folder"])
        trainer = _trl_gkd.trainer_of(self.parts, run, folder, use_cpu=not self.place.cuda, **options)
        clock = Clock(self.place)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        return self._trained(trainer, clock, alike=True)

    def _trained(self, trainer: Any, clock: Clock, alike: bool) -> dict[str, Any]:
        try:
            trainer.train()
        finally:  # the next run enters its own autocast
            trainer.accelerator.unwrap_model(self.parts.student, keep_fp32_wrapper=False)
            self.parts.student.zero_grad(set_to_none=True)
        return clock.row(alike)


def step(place: Place) -> Iterator[dict[str, Any]]:
    """A 0.5B student and a 3B teacher, 16 prompts a step: off-policy and on-policy, against TRL."""
    divide, steps = (16, 2) if place.small else (1, 5)
    lengths = GENERAL.divided(divide)
    rows = write_rows(place.folder / "general.jsonl", 96, lengths)
    student = saved(place, "0.5B", torch.float32)
    teacher = saved(place, "3B", torch.bfloat16 if place.cuda else torch.float32)
    limits = {"max_prompt": lengths.prompt[1] + 8, "max_response": lengths.response[1] + 8}

    def config(name: str, micro: int, recipe: str = "kd", steps: int = steps, **more: Any) -> dict[str, Any]:
        sizes = {"batch_size": 16, "micro_batch_size": micro, "max_steps": steps, **more}
        return tree(place, name, student, teacher, rows, recipe=recipe, train=sizes, data=limits)

    off, on = {"lmbda": 0.0, "beta": 0.0}, {"lmbda": 1.0, "beta": 0.0}
    liger = {"use_liger_kernel": True, **off}
    loaded = Loaded(place, config("loaded", 16))
    budget = {"micro_batch_tokens": 16384 // divide}
    todo: list[tuple[str, str, int, Any]] = [
        ("ours", "off-policy", 16, lambda: loaded.ours(config("a", 16))),
        ("ours", "off-policy", 4, lambda: loaded.ours(config("b", 4))),
        ("trl", "off-policy", 4, lambda: loaded.trl(config("c", 4), **off)),
        ("ours, padded", "off-policy", 4, lambda: loaded.ours(config("d", 4, packing="off"))),
        ("ours, 16,384 tokens", "off-policy", 0, lambda: loaded.ours(config("e", 8, **budget))),
        ("ours", "on-policy", 16, lambda: loaded.ours(config("f", 16, "imitkd", 3))),
        ("trl", "on-policy", 4, lambda: loaded.trl(config("g", 4, steps=2), **on)),
        ("trl", "off-policy", 16, lambda: loaded.trl(config("h", 16), **off)),
        ("trl with Liger", "off-policy", 16, lambda: loaded.trl(config("i", 16), **liger)),
    ]  # fmt: skip
    if place.small:
        todo = [todo[1], todo[2], todo[4], todo[5]]
    for who, policy, micro, run in todo:
        row: dict[str, Any] = {"who": who, "policy": policy, "micro_batch": micro or "by tokens"}
        place.forget()
        missing = "trl" if who.startswith("trl") else "stillhouse"
        missing = "liger_kernel" if "Liger" in who else missing
        if importlib.util.find_spec(missing) is None:
            row["skipped"] = f"{missing} is not installed"
        else:
            with attempt(row):
                row |= run()
        yield row


METHODS: dict[str, tuple[str, int]] = {
    "KD": ("kd", 8), "DistiLLM": ("distillm", 8), "ImitKD": ("imitkd", 4), "MiniLLM": ("minillm", 5),
    "GKD": ("gkd", 8),
}  # fmt: skip
"""By name: the recipe and how many steps are made, the first of which is not counted."""
SHARE = {"student_share": {"kind": "linear", "start": 0.2, "end": 1.0}}
"""Of the student's text in DistiLLM, which follows a validation loss that is not measured here."""


def paper(place: Place) -> Iterator[dict[str, Any]]:
    """GPT-2 XL teaches GPT-2 on rows as long as Dolly's, 8 a step: seconds a step of five methods."""
    lengths = DOLLY.divided(16 if place.small else 1)
    rows = write_rows(place.folder / "dolly.jsonl", 128, lengths)
    student = saved(place, "GPT-2", torch.float32)
    teacher = saved(place, "GPT-2 XL", torch.bfloat16 if place.cuda else torch.float32)
    limits = {"max_prompt": lengths.prompt[1] + 8, "max_response": lengths.response[1]}
    loaded = Loaded(place, tree(place, "loaded", student, teacher, rows, recipe="kd", data=limits))
    for name, (recipe, steps) in METHODS.items():
        if place.small and name not in ("KD", "DistiLLM"):
            continue
        sizes = {"batch_size": 8, "micro_batch_size": 8, "max_steps": 2 if place.small else steps}
        more = {"responses": SHARE} if recipe == "distillm" else {}
        config = tree(place, recipe, student, teacher, rows, recipe=recipe, train=sizes, data=limits, **more)
        row: dict[str, Any] = {"method": name, "student": "GPT-2", "teacher": "GPT-2 XL", "batch": 8}
        place.forget()
        with attempt(row):
            row |= loaded.ours(config, alike=name == "KD")
        yield row
