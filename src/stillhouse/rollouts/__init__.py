"""Whose responses a step trains on."""

from stillhouse.rollouts.adaptive import Adaptive
from stillhouse.rollouts.base import REGISTRY, ResponsePolicy, ResponsesConfig, ResponsesField, RolloutContext
from stillhouse.rollouts.batched import Batched
from stillhouse.rollouts.fixed import Fixed
from stillhouse.rollouts.generated import Generated
from stillhouse.rollouts.generator import ResponseGenerator
from stillhouse.rollouts.hidden_cache import TeacherHiddenCache
from stillhouse.rollouts.mixed import Mixed
from stillhouse.rollouts.on_policy import OnPolicy
from stillhouse.rollouts.pairs import Pairs
from stillhouse.rollouts.speculative import Speculative

__all__ = [
    "REGISTRY",
    "Adaptive",
    "Batched",
    "Fixed",
    "Generated",
    "Mixed",
    "OnPolicy",
    "Pairs",
    "ResponseGenerator",
    "ResponsePolicy",
    "ResponsesConfig",
    "ResponsesField",
    "RolloutContext",
    "Speculative",
    "TeacherHiddenCache",
]
