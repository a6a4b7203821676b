"""Numbers that move during training."""

from stillhouse.curriculum.adaptive import DevLoss, Momentum
from stillhouse.curriculum.curriculum import Curriculum
from stillhouse.curriculum.schedule import REGISTRY, Linear, NonNegative, Schedule, Share, scheduled

__all__ = [
    "REGISTRY",
    "Curriculum",
    "DevLoss",
    "Linear",
    "Momentum",
    "NonNegative",
    "Schedule",
    "Share",
    "scheduled",
]
