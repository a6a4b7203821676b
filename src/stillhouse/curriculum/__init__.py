"""Numbers that move during training."""

from stillhouse.curriculum.adaptive import DevLoss, Momentum, PreviousRound
from stillhouse.curriculum.curriculum import Curriculum
from stillhouse.curriculum.schedule import (
    REGISTRY,
    GradualBeta,
    Linear,
    NonNegative,
    Schedule,
    Share,
    scheduled,
)

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
