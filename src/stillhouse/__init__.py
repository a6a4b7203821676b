"""Stillhouse: distil large language models into small ones."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`stillhouse.objectives` and `stillhouse.fused_loss` on first use, so that the command line starts
    without torch."""
    if name == "objectives":
        return importlib.import_module("stillhouse.objectives")
    if name == "fused_loss":
        return importlib.import_module("stillhouse.objectives").fused_loss
    raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
