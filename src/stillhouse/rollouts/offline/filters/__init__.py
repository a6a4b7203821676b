"""Filters of responses: each says what it drops and why; a new filter is one file in this folder."""

from stillhouse.config import import_submodules
from stillhouse.rollouts.offline.filters.base import (
    REGISTRY,
    TEACHER_LOGPROB,
    Drop,
    Filter,
    FilterContext,
    FilterField,
)

import_submodules(__name__)

__all__ = ["REGISTRY", "TEACHER_LOGPROB", "Drop", "Filter", "FilterContext", "FilterField"]
