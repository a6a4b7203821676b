"""From YAML, recipe and overrides to one checked configuration with the origin of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse import recipes
from stillhouse.config import Layer, Layered, flatten, to_yaml, validate
from stillhouse.errors import ConfigError, Fault
from stillhouse.settings import RunConfig


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration, and where each of its values comes from.

    Example: `resolve("run.yaml", ["train.lr=1e-4"]).provenance["train.lr"]["origin"]  # "command line"`
    """

    config: RunConfig
    provenance: dict[str, dict[str, Any]]
    yaml: str


def resolve(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Resolved:
    """Put the layers on top of each other and check the result: default < recipe < file < overrides.

    Args:
        source: a YAML file, or its content as a dictionary.
        overrides: `a.b=value` texts of the command line, or keyword values of a Python call.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    given = Layer.of(source, "dictionary") if isinstance(source, Mapping) else Layer.read(source)
    if isinstance(overrides, Mapping):
        upper = [Layer.keywords(overrides)]
    else:
        upper = [Layer.override(text) for text in overrides]
    layered = Layered.merged(given, *upper)
    name = layered.values.get("recipe")
    if name is not None:
        if not isinstance(name, str):
            raise ConfigError(Fault("recipe", "must be the name of a method", got=repr(name)))
        recipe = recipes.find(name)
        layered = Layered.merged(Layer.read(recipe.path, f"recipe {recipe.name}"), given, *upper)
    config, origins = validate(RunConfig, layered)
    values = flatten(config)
    provenance = {path: {"value": values[path], "origin": origin} for path, origin in origins.items()}
    return Resolved(config, provenance, to_yaml(config))
