"""Looking at a tree of parts from outside: which class stands where, and all values by their path."""

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


def parts_in(annotation: Any) -> list[type[StrictConfig]]:
    """The classes of parts that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, StrictConfig):
        return [annotation]
    return [part for argument in typing.get_args(annotation) for part in parts_in(argument)]


def variants(base: type[StrictConfig]) -> list[type[StrictConfig]]:
    """A class with all of its subclasses."""
    return [base, *(found for child in base.__subclasses__() for found in variants(child))]


def kind_of(part: type[StrictConfig]) -> Any:
    """The name under which a class is chosen, or None."""
    return part.model_fields["kind"].default if "kind" in part.model_fields else None


def class_of(bases: list[type[StrictConfig]], value: Any) -> type[StrictConfig] | None:
    """Which of the classes under `bases` a value most probably stands for: by kind, else by its names."""
    if isinstance(value, str):  # a bare kind, such as `teacher: live`
        return next((part for base in bases for part in variants(base) if kind_of(part) == value), None)
    if not isinstance(value, Mapping):
        return None
    candidates = [part for base in bases for part in variants(base)]
    named = [part for part in candidates if "kind" in value and kind_of(part) == value["kind"]]
    ranked = sorted(named or candidates, key=lambda part: -sum(key in part.model_fields for key in value))
    return ranked[0] if ranked else None


def class_at(tree: type[StrictConfig], path: KeyPath, values: Any) -> type[StrictConfig] | None:
    """The class of the part at `path` in `values`, or None where there is no part."""
    part: type[StrictConfig] | None = tree
    bases: list[type[StrictConfig]] = [tree]
    for key in path:
        known = part.model_fields.get(str(key)) if part is not None else None
        if known is not None:
            bases = parts_in(known.annotation)
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return None
        part = class_of(bases, values)
    return part


def places(tree: type[StrictConfig], name: str, depth: int = 4) -> list[str]:
    """The dotted paths at which a field of that name exists, the shortest first."""

    def search(part: type[StrictConfig], prefix: KeyPath) -> Iterator[KeyPath]:
        for key, info in part.model_fields.items():
            if key == name:
                yield (*prefix, key)
            if len(prefix) < depth - 1:
                for inner in parts_in(info.annotation):
                    yield from search(inner, (*prefix, key))

    return [dotted(path) for path in sorted(set(search(tree, ())), key=lambda path: (len(path), path))]


def plain(value: Any) -> Any:
    """A tree of parts as mappings, lists and single values, defaults included."""
    if isinstance(value, StrictConfig):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(value: Any) -> dict[str, Any]:
    """Every single value of a tree by its dotted path, defaults included; lists of single values stay whole.

    Example: `flatten(config)["train.lr"]`
    """
    return {dotted(path): leaf for path, leaf in leaves(plain(value))}


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Paths and values of everything in a plain tree that holds nothing further."""
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value
