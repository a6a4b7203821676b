"""The base class of every config, and the registry that turns `{kind: ...}` into an instance of one."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from stillhouse.files import name_problem


class StrictConfig(BaseModel):
    """A frozen, strict pydantic model: the base of every section of the configuration.

    Unknown keys are refused and nothing is coerced: `True` is not a number and "3" not an integer.

    Components without heavy state (objectives, schedules) are their own config; the others (engines,
    teachers) have a config with a `build` method.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def changed_fields(self) -> set[str]:
        """The options that were given another value than their default.

        `model_fields_set` also has those of a file with all values in it, such as a run's resolved.yaml.
        """
        fields = type(self).model_fields
        return {name for name in self.model_fields_set if getattr(self, name) != fields[name].get_default()}

    def options_without_effect(self) -> dict[str, str]:
        """Its options that change nothing beside its other values, each with the reason; none by default.

        A user who has set one is told (`runs.inert`).
        """
        return {}


def because(reason: str, *names: str) -> dict[str, str]:
    """Several options with one reason, for `options_without_effect`."""
    return dict.fromkeys(names, reason)


ConfigT = TypeVar("ConfigT", bound=StrictConfig)
T = TypeVar("T")


def _possible(path: Path) -> Path:
    if (problem := name_problem(str(path))) is not None:
        raise PydanticCustomError(
            "path", "{problem} (got {path})", {"problem": problem, "path": repr(str(path)[:60])}
        )
    return path


def _given(path: Any) -> Any:
    if path == "":  # which would be the working directory
        raise PydanticCustomError("path", "is empty; a path is needed, . for the working directory")
    return path


FilePath = Annotated[Path, Field(strict=False), BeforeValidator(_given), AfterValidator(_possible)]
"""A path, given as a string."""

ListOf = Annotated[tuple[T, ...], Field(strict=False)]
"""A tuple, given as a YAML list."""


class Registry(Generic[ConfigT]):
    """The config classes of one family (objectives, schedules, ...) by their `kind`.

    Classes are added with a decorator; a `kind` that is taken is refused.

    Example:
        >>> REGISTRY = Registry("objective", Objective)
        >>> @REGISTRY.register
        ... class ForwardKL(Objective):
        ...     kind: Literal["forward_kl"] = "forward_kl"
    """

    def __init__(self, family: str, base: type[ConfigT], example: str | None = None) -> None:
        """Empty.

        Args:
            family: what its parts are called in errors.
            base: the class of all its configs.
            example: the kind that errors show; the first one unless given.
        """
        self.family = family
        self.base = base
        self.example = example
        self._classes: dict[str, type[ConfigT]] = {}

    def register(self, cls: type[ConfigT]) -> type[ConfigT]:
        """Add a class under the default of its `kind` field."""
        kind = cls.model_fields["kind"].default
        if kind in self._classes:
            raise ValueError(f"{self.family} {kind!r} is registered twice")
        self._classes[kind] = cls
        return cls

    def kinds(self) -> tuple[str, ...]:
        """All registered kinds, in the order of registration."""
        return tuple(self._classes)

    def __getitem__(self, kind: str) -> type[ConfigT]:
        return self._classes[kind]

    def parse(self, value: Any) -> ConfigT:
        """Build the config that `{kind: name, ...}` or a bare name stands for; an instance is returned as is.

        Raises:
            PydanticCustomError: there is no such kind; the message suggests the closest one.
            pydantic.ValidationError: an option is wrong; its path is relative to `value`.
        """
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "component_type",
                "should be a mapping with a kind, such as {kind: {example}}",
                {"example": self.example or self.kinds()[0]},
            )
        kind = value.get("kind")
        if kind is None:
            raise PydanticCustomError("kind_missing", "has no kind; allowed: {allowed}", self._allowed())
        if not isinstance(kind, str) or kind not in self._classes:
            near = nearest(str(kind), self._classes)
            raise PydanticCustomError(
                "kind_unknown",
                "no {family} is called {kind}{near}; allowed: {allowed}",
                {"family": self.family, "kind": repr(kind), "near": near, **self._allowed()},
            )
        return self._classes[kind].model_validate(dict(value))

    def _allowed(self) -> dict[str, Any]:
        return {"allowed": ", ".join(self.kinds())}

    def field(self) -> Any:
        """The annotation of a config field that holds one component of this family."""
        base: Any = self.base
        return Annotated[SerializeAsAny[base], BeforeValidator(self.parse)]  # type: ignore[misc]


def nearest(name: str, names: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """A suggestion for an error message: `" (did you mean 'x'?)"` if a known name is close, else `""`."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def walk(node: Any, visit: Callable[[str, Any], Any], path: str = "") -> Any:
    """Map `visit(path, value)` over a config tree, parents before children.

    `visit` returns a replacement, which is not descended into, or the same object to descend. Subtrees in
    which nothing was replaced are returned as the same objects.
    """
    replaced = visit(path, node)
    if replaced is not node:
        return replaced
    if isinstance(node, StrictConfig):
        update = {}
        for name in type(node).model_fields:
            value = getattr(node, name)
            new = walk(value, visit, f"{path}.{name}" if path else name)
            if new is not value:
                update[name] = new
        return node.model_copy(update=update) if update else node
    if isinstance(node, Mapping):
        rebuilt = {
            key: walk(value, visit, f"{path}.{key}" if path else str(key)) for key, value in node.items()
        }
        return rebuilt if any(rebuilt[key] is not node[key] for key in node) else node
    if isinstance(node, tuple):
        items = tuple(walk(value, visit, f"{path}[{index}]") for index, value in enumerate(node))
        return items if any(new is not old for new, old in zip(items, node, strict=True)) else node
    return node


def import_submodules(package: str) -> None:
    """Import every module of a package, so that the classes in them register themselves.

    Called in the `__init__` of a package whose modules fill a registry: a new component is one new file.
    """
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{module.name}")
