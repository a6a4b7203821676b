"""Strict configs and registries, layered YAML with the origin of every value, errors with field paths."""

from stillhouse.config.layers import Dropped, Layer, Layered
from stillhouse.config.loading import read_config, validate
from stillhouse.config.sizes import Bytes, Count
from stillhouse.config.strict import (
    FilePath,
    ListOf,
    Registry,
    StrictConfig,
    because,
    import_submodules,
    nearest,
    walk,
)
from stillhouse.config.trees import class_at, dotted, flatten, kind_of
from stillhouse.config.writing import commented_yaml, to_yaml

__all__ = [
    "Bytes",
    "Count",
    "Dropped",
    "FilePath",
    "Layer",
    "Layered",
    "ListOf",
    "Registry",
    "StrictConfig",
    "because",
    "class_at",
    "commented_yaml",
    "dotted",
    "flatten",
    "import_submodules",
    "kind_of",
    "nearest",
    "read_config",
    "to_yaml",
    "validate",
    "walk",
]
