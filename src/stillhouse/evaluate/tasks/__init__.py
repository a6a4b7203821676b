"""Tasks of the evaluation, one file for each family."""

from stillhouse.evaluate.tasks import (
    code,
    cost,
    exact_match,
    fidelity,
    instructions,
    lm_eval,
    maths,
    speculative,
)
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
    "code",
    "cost",
    "exact_match",
    "fidelity",
    "instructions",
    "lm_eval",
    "maths",
    "means_over_seeds",
    "speculative",
]
