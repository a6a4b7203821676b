"""Filters of responses: small named parts, each of which says what it drops and why."""

from stillhouse.curate.filters.base import REGISTRY, Around, Drop, Filter, FilterField
from stillhouse.curate.filters.duplicates import Duplicates, NearDuplicates
from stillhouse.curate.filters.form import Empty, Format, LengthRatio, Truncated
from stillhouse.curate.filters.language import Language
from stillhouse.curate.filters.likelihood import LogprobFloor
from stillhouse.curate.filters.overlap import Overlap
from stillhouse.curate.filters.repetition import Repetition
from stillhouse.curate.filters.verified import Verified

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
