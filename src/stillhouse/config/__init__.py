"""Strict configuration: parts, registries, layered YAML with the origin of every value, errors with paths."""

from stillhouse.config.layers import Layer, Layered
from stillhouse.config.loading import validate
from stillhouse.config.strict import FilePath, ListOf, Registry, StrictConfig, nearest, walk
from stillhouse.config.trees import flatten
from stillhouse.config.writing import commented_yaml, to_yaml

__all__ = [
    "FilePath",
    "Layer",
    "Layered",
    "ListOf",
    "Registry",
    "StrictConfig",
    "commented_yaml",
    "flatten",
    "nearest",
    "to_yaml",
    "validate",
    "walk",
]
