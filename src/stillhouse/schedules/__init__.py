"""Hyper-parameters that change during training; a new schedule is one file in this folder."""

from stillhouse.config import import_submodules
from stillhouse.schedules.adaptive import DevLoss, Momentum, PreviousRound
from stillhouse.schedules.base import REGISTRY, NonNegative, Schedule, Share, scheduled
from stillhouse.schedules.gradual_beta import GradualBeta
from stillhouse.schedules.ramps import Linear
from stillhouse.schedules.tracker import ScheduleTracker

import_submodules(__name__)

__all__ = [
    "REGISTRY",
    "DevLoss",
    "GradualBeta",
    "Linear",
    "Momentum",
    "NonNegative",
    "PreviousRound",
    "Schedule",
    "ScheduleTracker",
    "Share",
    "scheduled",
]
