"""Whose responses a step trains on."""

from stillhouse.responses.adaptive import Adaptive
from stillhouse.responses.base import REGISTRY, Context, Policy, ResponsesConfig, ResponsesField
from stillhouse.responses.batched import Batched
from stillhouse.responses.fixed import Fixed
from stillhouse.responses.generated import Generated
from stillhouse.responses.memory import TeacherMemory
from stillhouse.responses.mixed import Mixed
from stillhouse.responses.on_policy import OnPolicy
from stillhouse.responses.pairs import Pairs
from stillhouse.responses.speculative import Speculative
from stillhouse.responses.writer import Writer

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
