"""Engines write text: token ids in, token ids out."""

from stillhouse.engines.base import REGISTRY, Engine, EngineConfig, Sampling, TokenizerFacts
from stillhouse.engines.transformers import TransformersConfig

EngineField = REGISTRY.field()
"""The annotation of a configuration field that holds an engine."""

EngineField = REGISTRY.field()
"""The annotation of a config field that holds an engine."""

__all__ = [
    "REGISTRY",
    "Engine",
    "EngineConfig",
    "EngineField",
    "Sampling",
    "TokenizerFacts",
    "TransformersConfig",
]
