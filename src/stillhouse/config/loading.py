"""From merged layers to a validated config tree, with the origin of every value.

Paths in a configuration are relative to the working directory of the process, not to the YAML file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stillhouse.config.faults import to_faults
from stillhouse.config.layers import Layer, Layered
from stillhouse.config.strict import ConfigT, StrictConfig
from stillhouse.config.strict_yaml import KeyPath
from stillhouse.config.trees import dotted, leaves, plain
from stillhouse.errors import ConfigError

DEFAULT = "default"


def validate(tree: type[ConfigT], layered: Layered) -> tuple[ConfigT, dict[str, str]]:
    """Validate the merged values as a `tree`.

    Returns:
        The config, and for every path of `flatten(config)` the origin of its value: "default", "recipe kd",
        "run.yaml:12", "command line" or "keyword".

    Raises:
        ConfigError: lists every fault, not only the first.
    """
    try:
        config = tree.model_validate(layered.values)
    except ValidationError as error:
        raise ConfigError(*to_faults(error, tree, layered)) from error
    return config, provenance(config, layered)


def read_config(tree: type[ConfigT], source: Path, overrides: Sequence[str]) -> ConfigT:
    """A YAML file with the command line's `a.b=value` texts on top, as a `tree`.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    upper = Layer.joined([Layer.override(text) for text in overrides])
    return validate(tree, Layered.merged(Layer.read(source), upper))[0]


def provenance(config: StrictConfig, layered: Layered) -> dict[str, str]:
    """The origin of each value of `flatten(config)`."""
    return {dotted(path): _origin(config, path, layered) for path, _ in leaves(plain(config))}


def _origin(config: StrictConfig, path: KeyPath, layered: Layered) -> str:
    values: Any = layered.values
    value: Any = config
    written: KeyPath = ()
    """`path` as the layers have it: a part that is a list there has that list in one of its fields."""
    for key in path:
        if isinstance(values, list) and not isinstance(key, int):
            if getattr(value, "model_fields_set", set()) >= {key} and isinstance(getattr(value, key), tuple):
                value = getattr(value, key)
                continue
            return DEFAULT
        given = key in values if isinstance(values, Mapping) else isinstance(values, list)
        if not given:
            # Not in any layer: a default, or derived from a shorthand such as `train: rows.jsonl`.
            derived = isinstance(value, StrictConfig) and key in value.model_fields_set
            return layered.origin(written) or DEFAULT if derived else DEFAULT
        values = values[key]
        written = (*written, key)
        value = getattr(value, str(key)) if isinstance(value, StrictConfig) else value[key]
    return layered.origin(written) or DEFAULT
