"""Introspection of config trees: the class at a path, and every value by its path."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.config.strict import StrictConfig
from stillhouse.config.strict_yaml import KeyPath


def dotted(path: KeyPath) -> str:
    """`("data", "sets", 0, "path")` as `data.sets[0].path`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def config_classes(annotation: Any) -> list[type[StrictConfig]]:
    """The config classes that occur in the annotation of a field."""
    if isinstance(annotation, type) and issubclass(annotation, StrictConfig):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in config_classes(argument)]


def variants(base: type[StrictConfig]) -> list[type[StrictConfig]]:
    """A class and all of its subclasses, depth first."""
    return [base, *(found for child in base.__subclasses__() for found in variants(child))]


def kind_of(cls: type[StrictConfig]) -> Any:
    """The `kind` that selects a class; None for a class without one."""
    return cls.model_fields["kind"].default if "kind" in cls.model_fields else None


def class_of(bases: list[type[StrictConfig]], value: Any) -> type[StrictConfig] | None:
    """The subclass of `bases` that a value is meant for: by kind, else by the most matching keys.

    A guess, for error messages about values that do not validate.
    """
    if isinstance(value, str):  # a bare kind, such as `teacher: live`
        return next((cls for base in bases for cls in variants(base) if kind_of(cls) == value), None)
    if not isinstance(value, Mapping):
        return None
    candidates = [cls for base in bases for cls in variants(base)]
    named = [cls for cls in candidates if "kind" in value and kind_of(cls) == value["kind"]]
    ranked = sorted(named or candidates, key=lambda cls: -sum(key in cls.model_fields for key in value))
    return ranked[0] if ranked else None


def class_at(tree: type[StrictConfig], path: KeyPath, values: Any) -> type[StrictConfig] | None:
    """The config class that the value at `path` in `values` is meant for; None if it is not a config."""
    cls: type[StrictConfig] | None = tree
    bases: list[type[StrictConfig]] = [tree]
    for key in path:
        known = cls.model_fields.get(str(key)) if cls is not None else None
        if known is not None:
            bases = config_classes(known.annotation)
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return None
        cls = class_of(bases, values)
    return cls


def paths_of_field(tree: type[StrictConfig], name: str, depth: int = 4) -> list[str]:
    """The dotted paths of all fields called `name`, shortest first."""

    def search(cls: type[StrictConfig], prefix: KeyPath) -> Iterator[KeyPath]:
        for key, info in cls.model_fields.items():
            if key == name:
                yield (*prefix, key)
            if len(prefix) < depth - 1:
                for inner in config_classes(info.annotation):
                    yield from search(inner, (*prefix, key))

    return [dotted(path) for path in sorted(set(search(tree, ())), key=lambda path: (len(path), path))]


def plain(value: Any) -> Any:
    """A config tree as plain dictionaries, lists and scalars, defaults included."""
    if isinstance(value, StrictConfig):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(value: Any) -> dict[str, Any]:
    """Every scalar of a config tree by its dotted path, defaults included; lists of scalars stay whole.

    Example: `flatten(config)["train.lr"]`
    """
    return {dotted(path): leaf for path, leaf in leaves(plain(value))}


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """The path and value of every leaf of a plain tree; a list of scalars is one leaf."""
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value
