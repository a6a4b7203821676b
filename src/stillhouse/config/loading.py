"""From layers of values to a checked tree of parts, with the origin of every value.

Paths in a configuration are relative to the working directory of the process, not to the YAML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from stillhouse.config.faults import faults
from stillhouse.config.layers import Layered
from stillhouse.config.strict import ConfigT, StrictConfig
from stillhouse.config.strict_yaml import KeyPath
from stillhouse.config.trees import dotted, leaves, plain
from stillhouse.errors import ConfigError

DEFAULT = "default"


def validate(tree: type[ConfigT], layered: Layered) -> tuple[ConfigT, dict[str, str]]:
    """Check the merged values against a tree of parts.

    Returns:
        The tree, and for every path of `flatten(tree)` where its value comes from: "default", "recipe kd",
        "run.yaml:12", "command line" or "keyword".

    Raises:
        ConfigError: with every fault at once.
    """
    try:
        part = tree.model_validate(layered.values)
    except ValidationError as error:
        raise ConfigError(*faults(error, tree, layered)) from error
    return part, provenance(part, layered)


def provenance(part: StrictConfig, layered: Layered) -> dict[str, str]:
    """Where each value of `flatten(part)` comes from."""
    return {dotted(path): _origin(part, path, layered) for path, _ in leaves(plain(part))}


def _origin(part: StrictConfig, path: KeyPath, layered: Layered) -> str:
    values: Any = layered.values
    value: Any = part
    for depth, key in enumerate(path):
        given = key in values if isinstance(values, Mapping) else isinstance(values, list)
        if not given:
            # Not written itself: a default, or read out of a shorter form such as `train: rows.jsonl`.
            derived = isinstance(value, StrictConfig) and key in value.model_fields_set
            return layered.origin(path[:depth]) or DEFAULT if derived else DEFAULT
        values = values[key]
        value = getattr(value, str(key)) if isinstance(value, StrictConfig) else value[key]
    return layered.origin(path) or DEFAULT
