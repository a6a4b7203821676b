"""Numbers that move during training."""

from stillhouse.schedules.adaptive import DevLoss, Momentum, PreviousRound
from stillhouse.schedules.base import REGISTRY, GradualBeta, Linear, NonNegative, Schedule, Share, scheduled
from stillhouse.schedules.curriculum import Curriculum

__all__ = [
    "REGISTRY",
    "Curriculum",
    "DevLoss",
    "GradualBeta",
    "Linear",
    "Momentum",
    "NonNegative",
    "PreviousRound",
    "Schedule",
    "Share",
    "scheduled",
]
