"""Engines write text: token ids in, token ids out."""

from stillhouse.engines.base import REGISTRY, Engine, EngineConfig, Sampling, TokenizerFacts
from stillhouse.engines.transformers import TransformersConfig

__all__ = ["REGISTRY", "Engine", "EngineConfig", "Sampling", "TokenizerFacts", "TransformersConfig"]
