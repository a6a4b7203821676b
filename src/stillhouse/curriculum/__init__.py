"""Numbers that move during training."""

from stillhouse.curriculum.curriculum import Curriculum
from stillhouse.curriculum.schedule import REGISTRY, NonNegative, Schedule, Share, scheduled

__all__ = ["REGISTRY", "Curriculum", "NonNegative", "Schedule", "Share", "scheduled"]
