"""One YAML file for each method; copy one and edit it to make a method of your own.

The header says what it does, cites the paper, gives the loss, and lists where paper, released code and recipe
differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.config import nearest
from stillhouse.core.requirements import MAIN, STUDENT, Requirements
from stillhouse.errors import ConfigError, Fault
from stillhouse.files import name_problem, require_regular

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Recipe:
    """A shipped method.

    Example: `Recipe("kd", "Forward KL on the data set's own responses.", "Hinton et al. 2015", path)`
    """

    name: str
    summary: str
    paper: str
    path: Path

    @property
    def header(self) -> str:
        """The comment at the top of the file, without the comment signs."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").removeprefix(" "))
        return "\n".join(lines)

    @property
    def requirements(self) -> Requirements:
        """What its objective and its responses need of models and data."""
        from stillhouse.objectives.registry import parse_objective
        from stillhouse.rollouts.base import REGISTRY

        values = self._values
        responses = REGISTRY.parse(values.get("responses", "fixed"))
        return parse_objective(values["objective"]).requirements() | responses.requirements()

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of the teachers that it asks and does not bring itself, `main` first."""
        brought = {*self._values.get("teachers", {}), *([MAIN] if "teacher" in self._values else [])}
        names = self.requirements.model_names - {STUDENT} - brought
        return tuple(sorted(names, key=lambda name: (name != MAIN, name)))

    @property
    def _values(self) -> dict[str, Any]:
        """What is in the file."""
        from stillhouse.config import Layer, Layered

        return Layered.merged(Layer.read(self.path, "recipe")).values


def all_recipes() -> list[Recipe]:
    """All shipped methods, in alphabetical order."""
    return [_read(path) for path in sorted(FOLDER.glob("*.yaml"))]


def find(name: str) -> Recipe:
    """The recipe of that name, or in that file.

    Raises:
        ConfigError: there is none; the nearest names are in the message.
    """
    if (problem := name_problem(name)) is not None:
        raise ConfigError(Fault("recipe", problem, got=f"{name[:60]!r}"))
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        require_regular(path)
        if not path.is_file():
            raise ConfigError(Fault("recipe", "there is no such file", got=name))
        return _read(path)
    path = FOLDER / f"{name}.yaml"
    names = [recipe.name for recipe in all_recipes()]
    if name not in names:
        raise ConfigError(
            Fault("recipe", f"no method is called {name!r}{nearest(name, names)}", allowed=", ".join(names))
        )
    return _read(path)


def _read(path: Path) -> Recipe:
    lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines()[:12]]
    summary = lines[0].partition(": ")[2] if lines else ""
    paper = next((line.removeprefix("Paper:").strip() for line in lines if line.startswith("Paper:")), "")
    return Recipe(path.stem, summary, paper, path)
