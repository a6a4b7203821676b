"""Where the responses come from that a step trains on; a new response policy is one file in this folder."""

from stillhouse.config import import_submodules
from stillhouse.rollouts.base import REGISTRY, ResponsePolicy, ResponsesConfig, ResponsesField, RolloutContext
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.rollouts.hidden_cache import TeacherHiddenCache

import_submodules(__name__)

DEFAULT_RESPONSES = REGISTRY.parse("fixed")
"""What a run trains on unless it says otherwise: the responses of the data set."""

__all__ = [
    "DEFAULT_RESPONSES",
    "REGISTRY",
    "ResponseGenerator",
    "ResponsePolicy",
    "ResponsesConfig",
    "ResponsesField",
    "RolloutContext",
    "TeacherHiddenCache",
]
