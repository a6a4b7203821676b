"""The base of every configurable part, and the registry that turns `{kind: ...}` into one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from pydantic_core import PydanticCustomError


class StrictConfig(BaseModel):
    """A frozen, strict piece of configuration.

    Unknown keys are refused; `True` is no number and "3" no integer.

    Parts without heavy state (objectives, schedules) are what they configure;
    heavy ones have a `build` method.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


ConfigT = TypeVar("ConfigT", bound=StrictConfig)
T = TypeVar("T")

FilePath = Annotated[Path, Field(strict=False)]
"""A path given as text."""

ListOf = Annotated[tuple[T, ...], Field(strict=False)]
"""A sequence given as a YAML list."""


class Registry(Generic[ConfigT]):
    """A family of parts by name. A plain dictionary, filled by a decorator; duplicates are refused.

    Example:
        >>> REGISTRY = Registry("objective", Objective)
        >>> @REGISTRY.register
        ... class ForwardKL(Objective):
        ...     kind: Literal["forward_kl"] = "forward_kl"
    """

    def __init__(self, family: str, base: type[ConfigT]) -> None:
        self.family = family
        self.base = base
        self._parts: dict[str, type[ConfigT]] = {}

    def register(self, part: type[ConfigT]) -> type[ConfigT]:
        """Add a class under the default of its `kind` field."""
        kind = part.model_fields["kind"].default
        if kind in self._parts:
            raise ValueError(f"{self.family} {kind!r} is registered twice")
        self._parts[kind] = part
        return part

    def kinds(self) -> tuple[str, ...]:
        """All names, in the order of registration."""
        return tuple(self._parts)

    def __getitem__(self, kind: str) -> type[ConfigT]:
        return self._parts[kind]

    def parse(self, value: Any) -> ConfigT:
        """Turn `{kind: name, ...}` (or a bare name, or a finished part) into the part of that name.

        Raises:
            PydanticCustomError: no such kind; the nearest names are in the message.
            pydantic.ValidationError: the options are wrong; paths are relative to the part.
        """
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "part_type",
                "should be a mapping with a kind, such as {kind: {example}}",
                {"example": self.kinds()[0]},
            )
        kind = value.get("kind")
        if kind is None:
            raise PydanticCustomError("part_kind_missing", "has no kind; allowed: {allowed}", self._allowed())
        if not isinstance(kind, str) or kind not in self._parts:
            near = nearest(str(kind), self._parts)
            raise PydanticCustomError(
                "part_kind",
                "no {family} is called {kind}{near}; allowed: {allowed}",
                {"family": self.family, "kind": repr(kind), "near": near, **self._allowed()},
            )
        return self._parts[kind].model_validate(dict(value))

    def _allowed(self) -> dict[str, Any]:
        return {"allowed": ", ".join(self.kinds())}

    def field(self) -> Any:
        """The annotation for a config field that holds one part of this family."""
        base: Any = self.base
        return Annotated[SerializeAsAny[base], BeforeValidator(self.parse)]  # type: ignore[misc]


def nearest(name: str, names: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """`" (did you mean 'x'?)"` where a known name is near, else an empty text."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def walk(part: Any, visit: Callable[[str, Any], Any], path: str = "") -> Any:
    """Rebuild a tree of parts with every value passed through `visit(path, value)`.

    Parts in which nothing changed are kept as they are.

    `visit` returns a replacement, or the same object to go deeper.
    """
    replaced = visit(path, part)
    if replaced is not part:
        return replaced
    if isinstance(part, StrictConfig):
        update = {}
        for name in type(part).model_fields:
            value = getattr(part, name)
            new = walk(value, visit, f"{path}.{name}" if path else name)
            if new is not value:
                update[name] = new
        return part.model_copy(update=update) if update else part
    if isinstance(part, Mapping):
        rebuilt = {
            key: walk(value, visit, f"{path}.{key}" if path else str(key)) for key, value in part.items()
        }
        return rebuilt if any(rebuilt[key] is not part[key] for key in part) else part
    if isinstance(part, tuple):
        items = tuple(walk(value, visit, f"{path}[{index}]") for index, value in enumerate(part))
        return items if any(new is not old for new, old in zip(items, part, strict=True)) else part
    return part
