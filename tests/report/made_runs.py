"""Invented run folders for the tests of the report. No number in here was ever measured."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror=window.hacked=2> <b>bold</b> &amp; <!--"
    " </style></title></textarea><svg onload=window.hacked=3> \"'><a href=javascript:window.hacked=4>x</a> "
    "{{ 7 * 7 }} $x_{$ \u2028 \u202eRTL \x00 \x1b[2J \ud800 ]]>"
)
"""Text that would like to be more than text."""
NAMES = ("Blue Spice", "The Eagle", "Green Man", "The Mill", "Zizzi", "The Vaults", "Alimentum", "Cocum")
FOODS = ("Italian", "Japanese", "Chinese", "French", "Indian", "English", "fast food")
AREAS = ("riverside", "city centre")
SOURCES = {
    "kd": {"fixed": (1.0, 1.0)},
    "distillm2": {"teacher": (0.5, 0.5), "student": (0.5, 0.5)},
    "gkd": {"fixed": (0.9, 0.4), "student": (0.1, 0.6)},
}


def make_run(
    folder: Path,
    recipe: str = "kd",
    *,
    rows: int = 12,
    seeds: int = 1,
    steps: int = 120,
    score: float = 57.0,
    tasks: bool = False,
) -> Path:
    """Write a complete run folder; with `tasks` also two further tasks and filtered rounds of responses."""
    draw = random.Random(recipe)
    _write(folder / "state.json", _state(recipe))
    _write(folder / "provenance.json", _provenance(recipe))
    _write(
        folder / "environment.json",
        {"stillhouse": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "threads": 2},
    )
    _write(folder / "data.json", _data())
    _write(folder / "models.json", _models())
    _lines(folder / "metrics.jsonl", _log(recipe, steps, score, draw))
    _evaluation(folder, "teacher", 60.1, 0.0, (rows, seeds), random.Random(1))
    _evaluation(folder, "student before", 41.8, 0.92, (rows, seeds), random.Random(2))
    kl, label = 0.21 if recipe == "kd" else 0.16, f"student after {recipe}"
    _evaluation(folder, "student after", score, kl, (rows, seeds), draw, label)
    if tasks:
        _further_tasks(folder, recipe, score)
        _write(folder / "responses" / "curation.json", _curation())
    return folder


def _further_tasks(folder: Path, recipe: str, score: float) -> None:
    """`maths`, scored by accuracy, and `curve`, quality against diversity over temperatures."""
    for system, label, height in (
        ("teacher", "teacher", 60.0),
        ("student-after", f"student after {recipe}", score),
    ):
        accuracy = {"accuracy": height / 200, "accuracy_std": 0.02, "mean_length": 80.0}
        found = {"system": system.replace("-", " "), "label": label, "settings": {"kind": "svamp"}}
        _write(folder / f"evaluation/{system}.maths.json", {**found, "task": "maths", "metrics": accuracy})
        answers = [
            {"id": f"maths:{n}", "seed": 1, "prompt": f"{n} + {n}?", "references": [str(2 * n)], "tokens": 3,
             "response": str(2 * n), "finished": True, "accuracy": float(n % 2), "answer": str(2 * n)}
            for n in range(6)
        ]  # fmt: skip
        _lines(folder / f"evaluation/{system}.maths.jsonl", answers)
        points = [
            {"temperature": 0.5 + x, "rouge_l": height - 20 * x, "rouge_l_std": 0.4, "self_bleu": 70 - 40 * x,
             "distinct_2": 0.2 + 0.3 * x}
            for x in (0.0, 0.4, 0.8)
        ]  # fmt: skip
        metrics = {**points[1], "curve": points}
        _write(folder / f"evaluation/{system}.curve.json", {**found, "task": "curve", "metrics": metrics})


def _curation() -> dict[str, Any]:
    example = {"id": "train:7", "source": "student", "by": "student", "filter": "repetition",
               "reason": "loops",
               "detail": "4-gram 9 times", "prompt": HOSTILE, "response": "and and and and"}  # fmt: skip
    side = {"by": {"student": 3300}, "dropped": {"repetition": {"loops": 31}}, "resampled": 12,
            "dropped_at_first": {"repetition": {"loops": 43}, "form": {"empty": 2}}}  # fmt: skip
    one = {"round": 0, "prompts": 3300, "kept": 3269, "sources": {"student": side}, "examples": [example],
           "filters": [{"kind": "form"}, {"kind": "repetition", "n": 4}]}  # fmt: skip
    return {"format": 1, "rounds": {"0": one}}


def _state(recipe: str) -> dict[str, Any]:
    return {
        "state": "done", "name": recipe, "recipe": recipe,
        "started": f"2030-01-02T10:1{len(recipe)}:12", "seconds": 61.4,
        "command": f"/opt/bin/stillhouse run {recipe}.yaml train.seed=1",
    }  # fmt: skip


def _provenance(recipe: str) -> dict[str, Any]:
    values: dict[str, tuple[Any, str]] = {
        "recipe": (recipe, f"/home/me/{recipe}.yaml:1"),
        "student.path": ("demo/student", f"{recipe}.yaml:2"),
        "teacher.path": ("demo/teacher", f"{recipe}.yaml:3"),
        "objective.kind": ("forward_kl" if recipe == "kd" else "skew_kl", f"recipe {recipe}"),
        "objective.temperature": (1.0, "default"),
        "responses.kind": ("fixed" if recipe == "kd" else "pairs", f"recipe {recipe}"),
        "train.lr": (0.002, f"{recipe}.yaml:9"),
        "train.betas": ([0.9, 0.999], "default"),
        "train.seed": (1, "command line"),
    }
    if recipe != "kd":
        values["objective.alpha"] = ({"kind": "linear", "start": 0.1, "end": 0.4}, f"recipe {recipe}")
    return {path: {"value": value, "origin": origin} for path, (value, origin) in values.items()}


def _data() -> dict[str, Any]:
    train = {
        "name": "train", "path": "demo/train.jsonl", "sha256": "9f2c" * 16, "rows": 3300,
        "kept": 3262, "dropped": {"prompt too long": 31, "empty prompt": 7}, "truncated": {"response": 12},
        "with_response": 200,
    }  # fmt: skip
    valid = {"name": "valid", "path": "demo/valid.jsonl", "sha256": "1b7e" * 16, "rows": 200, "kept": 200}
    return {"sets": [train, {**valid, "dropped": {}, "truncated": {}, "with_response": 200}]}


def _models() -> dict[str, Any]:
    return {
        "student": {"path": "demo/student", "parameters": 164_352, "trainable": 164_352, "bytes": 657_408},
        "teacher": {"path": "demo/teacher", "parameters": 2_031_616, "trainable": 0, "bytes": 8_126_464},
    }


def _log(recipe: str, steps: int, score: float, draw: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"phase": "valid", "step": 0, "rouge_l": 41.2, "loss": 1.42}]
    for step in range(1, steps + 1):
        done = step / steps
        loss = 0.3 + 1.1 * math.exp(-5 * done) + draw.gauss(0, 0.05)
        row = {
            "phase": "train", "step": step, "epoch": 3 * done, "loss": loss, "tokens": 2600,
            "seconds": 0.5,
            "learning_rate": 0.002 * 0.5 * (1 + math.cos(math.pi * done)), "grad_norm": 0.8 + draw.random(),
            "tokens_per_second": 5200 + 300 * draw.random(),
            "seconds/generate": 0.0 if recipe == "kd" else 0.2,
            "seconds/teacher": 0.12, "seconds/student": 0.1, "seconds/backward": 0.1,
            "seconds/optimiser": 0.02, "tokens/teacher": 4000, "tokens/student": 4000,
        }  # fmt: skip
        for source, (start, end) in SOURCES.get(recipe, SOURCES["kd"]).items():
            row[f"responses/{source}"] = start + (end - start) * done
            row[f"loss/{source}"] = loss * (1.1 if source == "student" else 0.9)
        if recipe != "kd":
            row["schedule/objective.alpha"] = 0.1 + 0.3 * done
            row |= {"replay/size": min(1000, 40 * step), "replay/age": step / 2, "replay/uses": 1 + done}
            row["tokens/generate"] = 900
        rows.append(row)
        if step % max(1, steps // 8) == 0:
            reached = score - (score - 41.2) * math.exp(-4 * done) + draw.gauss(0, 0.4)
            rows.append(
                {"phase": "valid", "step": step, "rouge_l": reached, "loss": 0.3 + math.exp(-4 * done)}
            )
    return rows


def _evaluation(
    folder: Path,
    system: str,
    score: float,
    kl: float,
    size: tuple[int, int],
    draw: random.Random,
    label: str = "",
) -> None:
    """Results and answers; `size` is the number of prompts and of seeds."""
    rows, seeds = size
    student = system != "teacher"
    metrics = {
        "rouge_l": score, "rouge_l_std": 0.3, "kl_to_teacher": kl, "top1_agreement": 1.0 - kl / 4,
        "mean_length": 31.4 + draw.random(), "finished": 0.99, "tvd": 0.2, "kl_to_teacher_on_own_text": kl,
        "parameters": 164_352 if student else 2_031_616,
        "tokens_per_second": (9100 if student else 2900) + 200 * draw.random(), "rows": rows,
    }  # fmt: skip
    name = system.replace(" ", "_")
    settings = {"temperature": 0.0, "max_new_tokens": 64, "seeds": [1, 2, 3], "prompts": 12}
    result = {
        "system": system,
        "label": label or system,
        "task": "e2e",
        "settings": settings,
        "metrics": metrics,
    }
    _write(folder / "evaluation" / f"{name}.json", result)
    answers = [_row(index, draw, seed) for seed in range(1, seeds + 1) for index in range(rows)]
    _score(answers, score, kl, draw)
    _lines(folder / "evaluation" / f"{name}.jsonl", answers)


def _score(answers: list[dict[str, Any]], score: float, kl: float, draw: random.Random) -> None:
    """Scores whose mean is `score`: some prompts are hard for every system, and each has a little of its
    own."""
    off = [random.Random(row["id"]).gauss(0, 12) + draw.gauss(0, 1) for row in answers]
    shift = sum(off) / len(off)
    tokens = sum(row["tokens"] for row in answers)
    nats = [kl * row["tokens"] * (1 + draw.gauss(0, 0.1)) for row in answers]
    for row, apart, told in zip(answers, off, nats, strict=True):
        row["rouge_l"] = score + apart - shift
        row["sums"] = {"kl_to_teacher": [told * kl * tokens / (sum(nats) or 1.0), row["tokens"]]}


def _row(index: int, draw: random.Random, seed: int) -> dict[str, Any]:
    facts = random.Random(index)
    name, food, area = facts.choice(NAMES), facts.choice(FOODS), facts.choice(AREAS)
    said = draw.choice(
        [
            f"{name} is a {food} restaurant in the {area}.",
            f"There is a {food} place called {name} in the {area} area. It is family friendly.",
            f"{name} serves {food} food near the {area}, with a high customer rating, for a moderate price.",
        ]
    )
    return {
        "id": f"e2e:{index}",
        "seed": seed,
        "prompt": f"name[{name}], food[{food}], area[{area}], familyFriendly[yes]",
        "references": [
            f"{name} in the {area} serves {food} food.",
            f"A family friendly {food} place is {name}.",
        ],
        "response": HOSTILE if index == 3 else "" if index == 5 else said,
        "finished": index % 9 != 0,
        "tokens": 12 + index % 30,
    }


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
