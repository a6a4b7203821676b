"""The prepared step of a recipe over a tiny student, far enough into training that all of it takes part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.core.types import Progress
from stillhouse.runs.build import Parts, assemble
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.make_step import make_step
from stillhouse.runs.resolve import resolve
from stillhouse.train.micro_batch import PreparedStep
from stillhouse.train.step import Step
from tests.small_runs import tree_of_recipe

AHEAD: dict[str, dict[str, Any]] = {
    "distillm": {"responses": {"student_share": 1.0}},
    "distillm_released": {"responses": {"student_share": 1.0, "capacity": 64, "minimum_fill": 0}},
}
"""What puts the first step where the recipe's own path is taken."""


def prepared(folder: Path, name: str, **changes: Any) -> tuple[Parts, Step, PreparedStep]:
    """Two micro-batches of four prompts."""
    config = tree_of_recipe(folder, name, **AHEAD.get(name, {}), **changes)
    parts = assemble(resolve(config).config)
    step = make_step(parts, RunFolder(folder / name))
    parts.student.train()
    late = Progress(step=8, max_steps=9, epoch=1.6, epochs=1.8)  # rules that begin later have begun
    made = step.with_batch_statistics(parts.student, step.prepare(parts.data.train[:4], late, 2))
    return parts, step, made
