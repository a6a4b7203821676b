"""Stillhouse: distil large language models into small ones.

Example:
    >>> import stillhouse
    >>> result = stillhouse.run("run.yaml")
    >>> stillhouse.objectives.build("skew_kl", alpha=0.1)(student_logits, teacher_logits)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stillhouse import objectives
    from stillhouse.core.head import ModelHead
    from stillhouse.core.rows import Rows
    from stillhouse.fused.api import fused_loss
    from stillhouse.runs.api import run
    from stillhouse.runs.result import Result
    from stillhouse.runs.sweep import SweepResult, sweep
    from stillhouse.trainer import DistilConfig, DistilTrainer, distil

_LAZY = {
    "run": ("stillhouse.runs.api", "run"),
    "Result": ("stillhouse.runs.result", "Result"),
    "fused_loss": ("stillhouse.fused.api", "fused_loss"),
    "ModelHead": ("stillhouse.core.head", "ModelHead"),
    "Rows": ("stillhouse.core.rows", "Rows"),
    "objectives": ("stillhouse.objectives", None),
    "sweep": ("stillhouse.runs.sweep", "sweep"),
    "SweepResult": ("stillhouse.runs.sweep", "SweepResult"),
    "DistilConfig": ("stillhouse.trainer", "DistilConfig"),
    "DistilTrainer": ("stillhouse.trainer", "DistilTrainer"),
    "distil": ("stillhouse.trainer", "distil"),
}

__all__ = [
    "DistilConfig",
    "DistilTrainer",
    "ModelHead",
    "Result",
    "Rows",
    "SweepResult",
    "__version__",
    "distil",
    "fused_loss",
    "objectives",
    "run",
    "sweep",
]


def __dir__() -> list[str]:
    """The public names; without this, also what this file imports for itself."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for, so that `stillhouse --help` answers at once."""
    if name not in _LAZY:
        raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)
