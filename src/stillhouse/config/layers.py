"""Layers of config values (recipe, file, command line) merged in order, each value with its origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from stillhouse.config import strict_yaml
from stillhouse.config.strict_yaml import KeyPath
from stillhouse.errors import ConfigError

COMMAND_LINE = "command line"
CALL = "keyword"
"""The origin of values given to `stillhouse.run(..., name=value)`."""
OF_THE_SWEEP = "sweep"
"""The origin of values that a sweep sets itself."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The values of one source, such as a file or the command line.

    Example: `Layer({"train": {"lr": 1e-4}}, {("train",): "run.yaml:3", ("train", "lr"): "run.yaml:4"})`
    """

    values: dict[str, Any]
    origins: dict[KeyPath, str]

    @classmethod
    def read(cls, path: str | Path, name: str | None = None) -> Self:
        """A YAML file. With `name` ("recipe kd") every value has that origin instead of its line.

        Raises:
            ConfigError: see `strict_yaml.read`.
        """
        values, origins = strict_yaml.read(path)
        return cls(values, dict.fromkeys(origins, name) if name else origins)

    @classmethod
    def of(cls, values: Mapping[str, Any], origin: str) -> Self:
        """A mapping in memory; every value has the same origin."""
        origins: dict[KeyPath, str] = {}
        return cls(_copied(values, (), origin, origins), origins)

    @classmethod
    def override(cls, text: str) -> Self:
        """`a.b=value` from the command line; the value is YAML, and an empty one is null.

        Raises:
            ConfigError: there is no `=`, the path has an empty key, or the value is not YAML.
        """
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"{text!r}: an override is written name.name=value, such as train.lr=1e-4")
        try:
            parsed = strict_yaml.parse_value(value)
        except ConfigError as error:
            raise ConfigError(f"{text!r}: the value is not YAML: {error}") from error
        return cls.of(_nested(keys, parsed), COMMAND_LINE)

    @classmethod
    def keywords(cls, values: Mapping[str, Any]) -> Self:
        """Keyword arguments of a Python call; a name may be dotted: `{"train.lr": 1e-4}`."""
        return cls.joined([Layer.of(_nested(name.split("."), value), CALL) for name, value in values.items()])

    @classmethod
    def at(cls, path: str, value: Any, origin: str) -> Self:
        """One value at a dotted path."""
        return cls.of(_nested(path.split("."), value), origin)

    def below(self, key: str) -> Layer:
        """What the mapping at a key says, as a layer of its own."""
        origins = {path[1:]: origin for path, origin in self.origins.items() if path[:1] == (key,)}
        return Layer(self.values[key], origins)

    @classmethod
    def joined(cls, layers: Sequence[Layer]) -> Self:
        """Several layers of one source as one: a `kind` and its options belong together in any order."""
        layered = Layered(fits=lambda *_: True)
        for layer in layers:
            layered.add(layer)
        return cls(layered.values, layered.origins)


Fits = Callable[[KeyPath, Mapping[str, Any], Mapping[str, Any], str], bool]
"""Whether an option of the mapping at a path means the same after its kind has changed: the path, the mapping
below, the mapping above, the name of the option."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A value that a later layer took away without naming it: its kind has no such option.

    Example: `Dropped(("objective", "alpha"), 0.1, "recipe skl", "skew_kl", "jsd", "command line")`
    """

    path: KeyPath
    value: Any
    origin: str
    """Of the value."""
    kind: str
    """The kind that it was an option of."""
    by: str
    """What took its place."""
    because: str
    """The origin of that."""


@dataclass(slots=True)
class Layered:
    """The merged layers. A later layer overrides an earlier one.

    Mappings are merged key by key. Of a mapping with another `kind` than the one below only the options stay
    that `fits` says both kinds have; the others are in `dropped`. Lists and scalars are replaced.

    Example:
        >>> Layered.merged(Layer.read("run.yaml"), Layer.override("train.lr=1e-4"))
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    fits: Fits = lambda *_: False
    dropped: list[Dropped] = field(default_factory=list)

    @classmethod
    def merged(cls, *layers: Layer) -> Self:
        """All layers; the first has the lowest precedence."""
        layered = cls()
        for layer in layers:
            layered.add(layer)
        return layered

    def add(self, layer: Layer) -> None:
        """Merge one more layer, which overrides all before it."""
        self.values = self._merge(self.values, layer.values, (), layer)

    def _merge(
        self, below: dict[str, Any], above: dict[str, Any], path: KeyPath, layer: Layer
    ) -> dict[str, Any]:
        result = dict(below)
        for key, value in above.items():
            here = (*path, key)
            old = below.get(key)
            if isinstance(old, dict) and isinstance(value, dict):
                if _another_kind(old, value):
                    old = self._kept(old, value, here, layer)
                result[key] = self._merge(old, value, here, layer)
                if here not in self.origins or layer.origins[here] not in (COMMAND_LINE, CALL):
                    self.origins[here] = layer.origins[here]  # else a missing key is reported at the file
                continue
            self._forget(here)
            depth = len(here)
            self.origins |= {at: origin for at, origin in layer.origins.items() if at[:depth] == here}
            result[key] = value
        return result

    def _kept(
        self, below: dict[str, Any], above: dict[str, Any], path: KeyPath, layer: Layer
    ) -> dict[str, Any]:
        """The options of `below` that stay under the kind of `above`; what no layer says again is noted."""
        kept: dict[str, Any] = {}
        for name, value in below.items():
            if name != "kind" and self.fits(path, below, above, name):
                kept[name] = value
                continue
            here = (*path, name)
            if name != "kind" and name not in above:
                kinds = str(below.get("kind", "")), str(above["kind"])
                because = layer.origins[(*path, "kind")]
                self.dropped.append(Dropped(here, value, self.origin(here) or "", *kinds, because))
            self._forget(here)
        return kept

    def _forget(self, path: KeyPath) -> None:
        depth = len(path)
        self.origins = {at: origin for at, origin in self.origins.items() if at[:depth] != path}

    def origin(self, path: KeyPath) -> str | None:
        """The origin of the value at `path`, else of the innermost mapping around it; None at the root."""
        for depth in range(len(path), 0, -1):
            if path[:depth] in self.origins:
                return self.origins[path[:depth]]
        return None


def _another_kind(below: dict[str, Any], above: dict[str, Any]) -> bool:
    return "kind" in above and above["kind"] != below.get("kind")


def _nested(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _copied(value: Any, path: KeyPath, origin: str, origins: dict[KeyPath, str]) -> Any:
    """A copy, so that the caller's mappings are never changed; `origins` gets every path in it."""
    origins[path] = origin
    if isinstance(value, Mapping):
        return {key: _copied(item, (*path, key), origin, origins) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, (*path, index), origin, origins) for index, item in enumerate(value)]
    return value
