"""Strict configs and registries, layered YAML with the origin of every value, errors with field paths."""

from stillhouse.config.layers import Layer, Layered
from stillhouse.config.loading import validate
from stillhouse.config.sizes import Bytes
from stillhouse.config.strict import (
    FilePath,
    ListOf,
    Registry,
    StrictConfig,
    import_submodules,
    nearest,
    walk,
)
from stillhouse.config.trees import flatten
from stillhouse.config.writing import commented_yaml, to_yaml

__all__ = [
    "Bytes",
    "FilePath",
    "Layer",
    "Layered",
    "ListOf",
    "Registry",
    "StrictConfig",
    "commented_yaml",
    "flatten",
    "import_submodules",
    "nearest",
    "to_yaml",
    "validate",
    "walk",
]
