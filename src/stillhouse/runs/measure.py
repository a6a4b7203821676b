"""Two steps of a run in a process of their own, and what was predicted of them: memory and time.

The memory is predicted from sizes alone (`memory.py`). Time cannot be known without the machine, so a short
probe runs the same two steps with models of the same shapes but of one layer and of three: what a layer takes
is the difference, and a model of more layers takes that much more. So every phase of any method is covered,
whatever it does besides matrix products, and no constant of a machine is needed.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillhouse.config import to_yaml
from stillhouse.core.requirements import teacher_path
from stillhouse.errors import TrainingError
from stillhouse.models import load_tokenizer
from stillhouse.models.config import ModelConfig
from stillhouse.models.readers import auto_class
from stillhouse.runs.config import RunConfig
from stillhouse.runs.measured_steps import MARK
from stillhouse.runs.model_sizes import empty_student, without_weights
from stillhouse.runs.run_watch import CLOCK, PROCESSOR, Spent, minus
from stillhouse.runs.tokenizers import tokenizers
from stillhouse.runs.wall_time import MeasuredPhases, MeasuredStep, MeasuredWriting

STEPS = 2
REPEATS = 2
"""How often the probe runs; the fastest counts, for other programs only make it slower."""
PROBED = 3
"""Layers of the larger model of the probe."""
PROBE: Mapping[str, Any] = {
    "evaluate.before": False,
    "evaluate.teacher": False,
    "evaluate.limit": 1,
    "evaluate.valid_limit": 1,
    "train.save_every": "never",
    "train.keep": "last",
    "output.report": False,
}
"""What a probe leaves out."""
MODULE = "stillhouse.runs.measured_steps"


@dataclass(frozen=True, slots=True)
class StepCost:
    """What the second of two steps took, or was predicted to take.

    Example: `StepCost(0.84, 0.83, {"student": 0.3, "backward": 0.4, ...}, {"student": 1024.0})`
    """

    seconds: float
    """By the clock."""
    processor: float
    """Of the processor, all threads together."""
    phases: Mapping[str, float]
    """Seconds by the clock: generate, teacher, student (forward pass and loss), backward, optimiser."""
    tokens: Mapping[str, float]
    """How many the step read (student) and wrote (generate)."""

    def for_tokens(self, tokens: Mapping[str, float]) -> StepCost:
        """The cost of a step with so many tokens, which each phase but the optimiser's takes in proportion.

        How long responses get depends on what the models have learnt, which those of a probe have not.
        """

        def times(phase: str) -> float:
            kind = {"generate": "generate", "optimiser": ""}.get(phase, "student")
            return tokens[kind] / self.tokens[kind] if tokens.get(kind) and self.tokens.get(kind) else 1.0

        phases = {name: seconds * times(name) for name, seconds in self.phases.items()}
        before, now = sum(self.phases.values()), sum(phases.values())
        seconds = self.seconds + now - before
        return StepCost(seconds, self.processor * (now / before if before else 1.0), phases, dict(tokens))


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """What two steps took.

    Example: `MeasuredCost(1.21e9, tokens=1024, step=StepCost(0.84, 0.83, {...}), threads=1, ...)`
    """

    peak_memory: float
    """Bytes: of the process on a CPU, of tensors on a GPU."""
    tokens: int
    """Of the largest micro-batch of the two steps, padding included."""
    step: StepCost
    """The second one; the first one also pays for what is set up once."""
    threads: int
    run: MeasuredPhases
    """What the run of these steps took, by the clock."""
    run_processor: MeasuredPhases
    """The same in seconds of the processor."""

    @property
    def share_of_processor(self) -> float:
        """How much of the processor the step had, of what it asked for; less than 1 where others ran too."""
        return min(1.0, self.step.processor / max(1e-9, self.step.seconds * self.threads))


def measure(config: RunConfig) -> MeasuredCost:
    """Run the configuration for two optimiser steps in a new process, with export and evaluation.

    Tasks are left out, and at most as many held-out prompts are evaluated as one batch of the engine takes.
    Of the rows as many are read as two steps take. Everything goes into a temporary folder.

    Raises:
        TrainingError: the run failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="stillhouse-measure-") as folder:
        began = spent_on_processes()
        (found,) = _run(config, [{}], Path(folder))
        process = minus(spent_on_processes(), began)
    phases = [
        _phases(found[name], starting=max(0.0, process[by] - found["took"][by]))
        for by, name in ((CLOCK, "run"), (PROCESSOR, "run_processor"))
    ]
    return MeasuredCost(found["memory"], found["tokens"], _step_cost(found), found["threads"], *phases)


def spent_on_processes() -> Spent:
    """The clock, and the processor's seconds of all processes that this one started and that have ended."""
    times = os.times()
    return time.perf_counter(), times.children_user + times.children_system, times.children_system


def predict(config: RunConfig, repeats: int = REPEATS) -> StepCost | None:
    """What the second of two steps will take on this machine, by a probe with small models.

    Args:
        config: the run.
        repeats: how often the probe runs.

    Returns:
        None where the models of the run cannot be made with fewer layers: those that come with code of their
        own, read images, or answer from a cache alone or another process. A cache that a teacher fills is
        taken for empty.

    Raises:
        TrainingError: the probe failed; the message ends with what it said.
    """
    models = _models(config)
    if models is None:
        return None
    depths = {name: min(PROBED, model.layers) for name, model in models.items()}
    grown = [name for name, depth in depths.items() if depth > 1]
    with tempfile.TemporaryDirectory(prefix="stillhouse-probe-") as place:
        folder = Path(place)
        changes = []
        for large in (None, *grown):
            more: dict[str, Any] = {}
            for name, model in models.items():
                more |= model.write(folder, depths[name] if name == large else 1)
            changes.append(more)
        stores = _cache_fields(config)
        runs = [{**PROBE, **one} for one in changes for _ in range(repeats)]
        for n, one in enumerate(runs):  # a store of its own for each, so that none finds what another stored
            one.update({field: str(folder / f"store-{n}") for field in stores})
        found = _run(config, runs, folder)
    costs = [_fastest(found[n : n + repeats]) for n in range(0, len(found), repeats)]
    layers = [(models[name].layers - 1) / (depths[name] - 1) for name in grown]
    return _extended(costs[0], list(zip(layers, costs[1:], strict=True)))


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """A model of a run, which can be made with fewer layers.

    Example: `ProbedModel("teacher", config, "bfloat16", tokenizer)`
    """

    path: str
    """Where it stands in the configuration."""
    config: Any
    """Its transformers config."""
    dtype: str
    tokenizer: Any

    @property
    def layers(self) -> int:
        """Of the whole model."""
        return int(self.config.num_hidden_layers)

    def write(self, folder: Path, depth: int) -> dict[str, Any]:
        """Write it with so many layers and random weights; the values that make a run read it."""
        path = folder / f"{self.path}-{depth}"
        if not path.exists():
            config = with_layers(self.config, depth)
            model = auto_class(config).from_config(config)
            model.to(getattr(torch, self.dtype)).save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        values: dict[str, Any] = {f"{self.path}.path": str(path), f"{self.path}.tokenizer": None}
        if self.path == "student":
            values |= {"student.from_teacher": None, "student.from_config": None}
        return values


def with_layers(config: Any, depth: int) -> Any:
    """A transformers config with so many layers; lists with an entry for each layer are cut as well."""
    smaller = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            setattr(smaller, name, type(value)(value[:depth]))
    smaller.num_hidden_layers = depth
    return smaller


def _models(config: RunConfig) -> dict[str, ProbedModel] | None:
    """The models that a run loads, by path; None where one cannot be made with fewer layers."""
    main = None if config.teacher is None else config.teacher.model_to_load()
    tokenizer = tokenizers(config).student
    empty, dtype = empty_student(config.student, main, len(tokenizer))
    found = {"student": ProbedModel("student", empty.config, dtype, tokenizer)}
    for name, teacher in config.all_teachers.items():
        if teacher.of_student:
            continue
        model = teacher.model_to_load()
        if model is None or not _plain(model):
            return None
        path = ".".join(filter(None, (teacher_path(name), teacher.model_field)))
        empty = without_weights(model)
        found[path] = ProbedModel(path, empty.config, _dtype(model.dtype, empty), load_tokenizer(model))
    if not _plain(config.student):
        return None
    readable = all(hasattr(one.config, "num_hidden_layers") for one in found.values())
    seeing = any(hasattr(one.config, "vision_config") for one in found.values())
    return found if readable and not seeing else None


def _plain(model: ModelConfig) -> bool:
    """Whether it is made by a class of transformers, from weights of its own."""
    return not (model.trust_remote_code or model.gguf_file or getattr(model, "adapter", None))


def _dtype(dtype: str, model: Any) -> str:
    """The name of what its weights are loaded in."""
    return str(model.config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype


def _linked_caches(config: RunConfig, folder: Path) -> dict[str, str]:
    """Links to what the teachers' caches hold, so that they are read and nothing is added to them.

    Returns:
        The values that make a run use the folders with these links.
    """
    fields = _cache_fields(config)
    places = {cache: folder / f"cache-{n}" for n, cache in enumerate(dict.fromkeys(fields.values()))}
    for cache, place in places.items():
        _link(cache, place)
    return {field: str(places[cache]) for field, cache in fields.items()}


def _cache_fields(config: RunConfig) -> dict[str, Path]:
    """The folders of all teachers' caches, by the path of the value."""
    return {
        f"{teacher_path(name)}.{field}": cache
        for name, teacher in config.all_teachers.items()
        for field, cache in teacher.cache_folders().items()
    }


def _link(source: Path, to: Path) -> None:
    """A folder of links to the files of another one."""
    to.mkdir()
    for path in sorted(source.rglob("*")) if source.is_dir() else ():
        link = to / path.relative_to(source)
        if path.is_dir():
            link.mkdir()
        else:
            link.symlink_to(path.absolute())


def aside(config: RunConfig, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The run of two steps that leaves everything outside of a folder as it is.

    Args:
        config: the run.
        folder: where its own folder, links to teachers' caches and so on go.

    Returns:
        Its YAML file, and the values that lie over those of the file.
    """
    batch = getattr(config.engine, "batch_size", 1)
    train = config.data.train.limited(STEPS * config.train.batch_size)
    data = config.data.model_copy(update={"train": train, "token_cache": False})
    file = folder / "run.yaml"
    file.write_text(to_yaml(config.model_copy(update={"data": data})), encoding="utf-8")
    return file, {
        **_linked_caches(config, folder),
        "output.folder": str(folder / "run"),
        "output.shared": None,
        "train.max_steps": STEPS,
        "train.log_every": 1,
        "train.report_to": [],
        "evaluate.tasks": [],
        "evaluate.limit": min(batch, config.evaluate.limit or batch),
    }


def _run(config: RunConfig, changes: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Two steps of each of these runs, one after the other in a new process."""
    file, common = aside(config, folder)
    overrides = [common | {"output.folder": str(folder / f"run-{n}"), **one} for n, one in enumerate(changes)]
    listed = folder / "changes.json"
    listed.write_text(json.dumps(overrides), encoding="utf-8")
    command = [sys.executable, "-m", MODULE, str(file), str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not marked:
        said = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise TrainingError(f"--measure: the two steps failed. {said}")
    answer: list[dict[str, Any]] = json.loads(marked[-1].removeprefix(MARK))
    return answer


def _step_cost(found: Mapping[str, Any]) -> StepCost:
    return StepCost(found["seconds"], found["processor"], found["phases"], found["of_tokens"])


def _phases(found: Mapping[str, Any], starting: float) -> MeasuredPhases:
    return MeasuredPhases(
        starting,
        **{
            **found,
            "steps": [MeasuredStep(**one) for one in found["steps"]],
            "writings": {name: MeasuredWriting(**one) for name, one in found["writings"].items()},
            "evaluations": [MeasuredWriting(**one) for one in found["evaluations"]],
        },
    )


def _fastest(found: Sequence[Mapping[str, Any]]) -> StepCost:
    """The least of each number over several runs of the same."""
    costs = [_step_cost(one) for one in found]
    phases = {name: min(cost.phases.get(name, 0.0) for cost in costs) for name in costs[0].phases}
    least = min(one.seconds for one in costs), min(one.processor for one in costs)
    return StepCost(*least, phases, costs[0].tokens)


def _extended(base: StepCost, grown: Sequence[tuple[float, StepCost]]) -> StepCost:
    """The cost with so many times as much more as each grown model took more than the base."""

    def whole(first: float, others: Sequence[float]) -> float:
        more = (factor * max(0.0, other - first) for (factor, _), other in zip(grown, others, strict=True))
        return first + sum(more)

    costs = [cost for _, cost in grown]
    phases = {
        name: whole(first, [one.phases.get(name, 0.0) for one in costs])
        for name, first in base.phases.items()
    }
    seconds = whole(base.seconds, [one.seconds for one in costs])
    processor = whole(base.processor, [one.processor for one in costs])
    return StepCost(seconds, processor, phases, base.tokens)
