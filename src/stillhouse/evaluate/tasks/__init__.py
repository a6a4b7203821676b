"""Tasks of the evaluation, one file for each family."""

from stillhouse.evaluate.tasks import cost, exact_match, fidelity, instructions, speculative
from stillhouse.evaluate.tasks.base import (
    REGISTRY,
    Asked,
    Question,
    Scores,
    Task,
    means_over_seeds,
)
from stillhouse.evaluate.tasks.probe import Bench, Outcome, Probe, TaskField

__all__ = [
    "REGISTRY",
    "Asked",
    "Bench",
    "Outcome",
    "Probe",
    "Question",
    "Scores",
    "Task",
    "TaskField",
    "cost",
    "exact_match",
    "fidelity",
    "instructions",
    "means_over_seeds",
    "speculative",
]
