"""Objectives by name: the registry, and the spellings that a configuration accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError

from stillhouse.config import Layer, Layered, Registry, nearest, validate, walk
from stillhouse.core.types import SOURCES
from stillhouse.errors import ConfigError, Fault
from stillhouse.objectives.base import Objective

REGISTRY: Registry[Objective] = Registry("objective", Objective, "forward_kl")  # type: ignore[type-abstract]


def build(kind: str, **options: Any) -> Objective:
    """The objective of that name. Example: `build("skew_kl", alpha=0.1)(student_logits, teacher_logits)`.

    Raises:
        ConfigError: no objective has that name, or an option is wrong.
    """
    if kind not in kinds():
        problem = f"no objective is called {kind!r}{nearest(kind, kinds())}"
        raise ConfigError(Fault("kind", problem, allowed=", ".join(kinds())))
    return validate(REGISTRY[kind], Layered.merged(Layer.of(options, "keyword")))[0]


def kinds() -> tuple[str, ...]:
    """All names that `build` knows."""
    return REGISTRY.kinds()


def parse_objective(value: Any) -> Objective:
    """Accept `{kind: ...}`, or a map from source to objective, which is short for `{kind: by_source,
    ...}`."""
    if isinstance(value, Mapping) and "kind" not in value and value:
        unknown = [key for key in value if key not in SOURCES]
        if unknown and len(unknown) == len(value):
            return REGISTRY.parse(value)  # no source at all: the message about the missing kind fits
        if unknown:
            raise PydanticCustomError(
                "objective_source",
                "no source is called {source}{near}; allowed: {allowed}",
                {
                    "source": repr(unknown[0]),
                    "near": nearest(str(unknown[0]), SOURCES),
                    "allowed": ", ".join(SOURCES),
                },
            )
        value = {"kind": "by_source", **value}
    return REGISTRY.parse(value)


TreeT = TypeVar("TreeT")


def each_objective(tree: TreeT, how: Callable[[Objective], Objective]) -> TreeT:
    """The tree of parts with every objective in it replaced by `how(objective)`."""
    changed: TreeT = walk(tree, lambda _, value: how(value) if isinstance(value, Objective) else value)
    return changed


ObjectiveField = Annotated[SerializeAsAny[Objective], BeforeValidator(parse_objective)]
"""The annotation of a config field that holds an objective in any of the accepted spellings."""

ConfigT = TypeVar("ConfigT", bound=type[Objective])


def register(objective: ConfigT) -> ConfigT:
    """Add an objective to the registry under the default of its `kind`."""
    REGISTRY.register(objective)
    return objective
