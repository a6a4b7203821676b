"""Filters of responses: small named parts, each of which says what it drops and why."""

from stillhouse.rollouts.offline.filters.base import REGISTRY, Around, Drop, Filter, FilterField
from stillhouse.rollouts.offline.filters.duplicates import Duplicates, NearDuplicates
from stillhouse.rollouts.offline.filters.form import Empty, Format, LengthRatio, Truncated
from stillhouse.rollouts.offline.filters.language import Language
from stillhouse.rollouts.offline.filters.likelihood import LogprobFloor
from stillhouse.rollouts.offline.filters.overlap import Overlap
from stillhouse.rollouts.offline.filters.repetition import Repetition
from stillhouse.rollouts.offline.filters.verified import Verified

__all__ = [
    "REGISTRY",
    "Around",
    "Drop",
    "Duplicates",
    "Empty",
    "Filter",
    "FilterField",
    "Format",
    "Language",
    "LengthRatio",
    "LogprobFloor",
    "NearDuplicates",
    "Overlap",
    "Repetition",
    "Truncated",
    "Verified",
]
