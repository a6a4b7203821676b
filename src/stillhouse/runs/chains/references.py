"""`stage:NAME`: what an earlier stage of the chain leaves, wherever a configuration takes a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from stillhouse.config import Layered, dotted, nearest, walk
from stillhouse.config.strict_yaml import KeyPath
from stillhouse.errors import ConfigError, Fault

TreeT = TypeVar("TreeT")
PREFIX = "stage:"


@dataclass
class References:
    """Puts the folders of earlier stages in the place of `stage:NAME` and `stage:NAME/file`.

    Example: `References(Path("runs/ship"), ["warm", "distil"], "distil").put(layered)`
    """

    chain: Path
    stages: Sequence[str]
    """All stages, in order."""
    stage: str
    """The one whose values these are."""
    leaves: Mapping[str, str] = field(default_factory=dict)
    """The stages that leave a file for others, and its name; of the others the folder is what they leave."""
    found: list[str] = field(default_factory=list)
    """The stages that were referred to, each once, in the order of their appearance."""

    def put(self, layered: Layered) -> None:
        """Replace each reference in the values.

        Raises:
            ConfigError: with each one to a stage that there is not, or that does not come earlier.
        """
        faults: list[Fault] = []

        def visit(value: Any, path: KeyPath) -> Any:
            if isinstance(value, Mapping):
                return {key: visit(item, (*path, key)) for key, item in value.items()}
            if isinstance(value, list):
                return [visit(item, (*path, index)) for index, item in enumerate(value)]
            if not isinstance(value, str) or not value.startswith(PREFIX):
                return value
            name, slash, rest = value.removeprefix(PREFIX).partition("/")
            problem = self._problem(name)
            if problem is not None:
                earlier = ", ".join(f"{PREFIX}{one}" for one in self._earlier) or "none, it is the first"
                faults.append(Fault(dotted(path), problem, value, earlier, origin=layered.origin(path)))
                return value
            if name not in self.found:
                self.found.append(name)
            left = "" if slash else self.leaves.get(name, "")
            return str(self.chain / name / left) + slash + rest

        layered.values = visit(layered.values, ())
        if faults:
            raise ConfigError(*faults)

    @property
    def _earlier(self) -> Sequence[str]:
        return self.stages[: self.stages.index(self.stage)]

    def _problem(self, name: str) -> str | None:
        if name in self._earlier:
            return None
        if name == self.stage:
            return "a stage cannot start from itself"
        if name in self.stages:
            return f"the stage {name} comes later, and a stage takes what earlier ones leave"
        return f"no stage is called {name!r}{nearest(name, list(self.stages))}"


def with_stand_ins(tree: TreeT, stand_ins: Mapping[str, str]) -> TreeT:
    """A configuration with the folders of stand-ins in the place of those of stages."""

    def visit(_: str, value: Any) -> Any:
        return type(value)(stood_in(str(value), stand_ins)) if isinstance(value, str | Path) else value

    replaced: TreeT = walk(tree, visit)
    return replaced


def stood_in(path: str, stand_ins: Mapping[str, str]) -> str:
    """A path with the folder of a stand-in in the place of that of a stage, where it begins with one.

    Args:
        path: any text of a configuration.
        stand_ins: folder of a stage -> folder of what stands in for it.
    """
    for folder, place in stand_ins.items():
        if path == folder or path.startswith(f"{folder}/"):
            return place + path.removeprefix(folder)
    return path
