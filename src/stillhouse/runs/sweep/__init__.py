"""Sweeps: runs that differ in some of their values, chosen by a grid or by Optuna, resumable as a whole."""

from stillhouse.runs.sweep.execute import SweepResult, checked_members, execute_sweep, sweep
from stillhouse.runs.sweep.plan import SweepPlan

__all__ = ["SweepPlan", "SweepResult", "checked_members", "execute_sweep", "sweep"]
