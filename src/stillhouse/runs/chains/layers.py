"""Layers of values cut down to what a stage takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from stillhouse.config import Layer, Layered, StrictConfig, flatten, validate
from stillhouse.errors import ConfigError, Fault

ConfigT = TypeVar("ConfigT", bound=StrictConfig)


def only(layer: Layer, keys: Collection[str]) -> Layer:
    """The values of a layer under these keys."""
    values = {key: value for key, value in layer.values.items() if key in keys}
    return Layer(
        values, {path: origin for path, origin in layer.origins.items() if path[:1] and path[0] in keys}
    )


def refuse_idle(own: Sequence[Layer], known: Collection[str], section: str) -> None:
    """Refuse what a stage says itself and makes no use of.

    Args:
        own: the layers of the stage alone.
        known: the keys that it reads.
        section: which of them makes it the stage that it is.

    Raises:
        ConfigError: naming each key.
    """
    idle = [
        Fault(
            key,
            f"has no effect in a stage with {section}",
            allowed=", ".join(sorted(known)),
            origin=layer.origins.get((key,)),
        )
        for layer in own
        for key in layer.values
        if key not in known
    ]
    if idle:
        raise ConfigError(*idle)


def checked(kind: type[ConfigT], layered: Layered) -> tuple[ConfigT, dict[str, dict[str, Any]]]:
    """The values of a stage, and each with its origin.

    Raises:
        ConfigError: everything that is wrong with them.
    """
    values, origins = validate(kind, layered)
    flat = flatten(values)
    return values, {path: {"value": flat[path], "origin": origin} for path, origin in origins.items()}
