"""Generation engines: token ids in, token ids out."""

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from stillhouse.engines.base import REGISTRY, Engine, EngineConfig, Sampling, TokenizerInfo
from stillhouse.engines.server import ServerConfig, ServerEngine
from stillhouse.engines.transformers import TransformersConfig
from stillhouse.engines.vllm import VllmConfig

EngineField = Annotated[SerializeAsAny[EngineConfig], BeforeValidator(REGISTRY.parse)]
"""The annotation of a config field that holds an engine."""

__all__ = [
    "REGISTRY",
    "Engine",
    "EngineConfig",
    "EngineField",
    "Sampling",
    "ServerConfig",
    "ServerEngine",
    "TokenizerInfo",
    "TransformersConfig",
    "VllmConfig",
]
