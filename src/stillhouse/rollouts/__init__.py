"""Whose responses a step trains on."""

from stillhouse.rollouts.adaptive import Adaptive
from stillhouse.rollouts.base import REGISTRY, Context, Policy, ResponsesConfig, ResponsesField
from stillhouse.rollouts.batched import Batched
from stillhouse.rollouts.fixed import Fixed
from stillhouse.rollouts.generated import Generated
from stillhouse.rollouts.memory import TeacherMemory
from stillhouse.rollouts.mixed import Mixed
from stillhouse.rollouts.on_policy import OnPolicy
from stillhouse.rollouts.pairs import Pairs
from stillhouse.rollouts.speculative import Speculative
from stillhouse.rollouts.writer import Writer

__all__ = [
    "REGISTRY",
    "Adaptive",
    "Batched",
    "Context",
    "Fixed",
    "Generated",
    "Mixed",
    "OnPolicy",
    "Pairs",
    "Policy",
    "ResponsesConfig",
    "ResponsesField",
    "Speculative",
    "TeacherMemory",
    "Writer",
]
