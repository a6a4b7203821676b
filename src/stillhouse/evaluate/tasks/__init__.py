"""Evaluation tasks: every module here is imported, so a new task is one new file."""

from stillhouse.config import import_submodules
from stillhouse.evaluate.tasks.base import REGISTRY, EvalContext, EvalTask, TaskField, TaskResult
from stillhouse.evaluate.tasks.prompts import (
    EvalExample,
    EvalSet,
    FewShotTask,
    PromptTask,
    ScoredTask,
    Scores,
)

import_submodules(__name__)

__all__ = [
    "REGISTRY",
    "EvalContext",
    "EvalExample",
    "EvalSet",
    "EvalTask",
    "FewShotTask",
    "PromptTask",
    "ScoredTask",
    "Scores",
    "TaskField",
    "TaskResult",
]
