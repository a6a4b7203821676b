"""Rankers: what makes one of several responses to a prompt better than another. One file each."""

from stillhouse.config import import_submodules
from stillhouse.evaluate.rankers.base import REGISTRY, Ranker, RankerField, RankingPlace

import_submodules(__name__)

__all__ = ["REGISTRY", "Ranker", "RankerField", "RankingPlace"]
