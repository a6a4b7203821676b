"""How a run asked its student: what an evaluation of that student uses where the user says nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.config.strict_yaml import read
from stillhouse.errors import ConfigError
from stillhouse.files import locate, write_json
from stillhouse.runs.config import RunConfig

SETTINGS_FILE = "stillhouse.json"
"""In the folder of an exported student, so that they stay with it wherever it is copied."""
DATA_FIELDS = ("template", "max_prompt", "max_response", "too_long")
EVALUATE_FIELDS = ("sampling", "seeds")


@dataclass(frozen=True, slots=True)
class OwnSettings:
    """Parts of a run's configuration; empty for a model that comes from no run.

    Example: `OwnSettings({"template": {"kind": "plain"}, "max_response": 48}, {"seeds": [10]})`
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    """Of the `data` section: `template` and the length rules."""
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    """The `evaluate` section's `sampling` and `seeds`."""


def write_own_settings(config: RunConfig, student: Path) -> None:
    """Write the settings of a run into the folder of its student."""
    write_json(student / SETTINGS_FILE, _parts(config.model_dump(mode="json")))


def own_settings(model: str) -> OwnSettings:
    """The settings that a run folder, its student's folder or a copy of that has; empty for other models.

    Raises:
        ConfigError: the file cannot be read.
    """
    place = locate(model)
    for folder in (place / "student", place):
        path = folder / SETTINGS_FILE
        if path.is_file():
            try:
                return _own(json.loads(path.read_text("utf-8")))
            except (OSError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{path}: cannot be read ({error}); give --template and remove it"
                ) from None
    for run in (place, place.parent):
        if (run / "resolved.yaml").is_file() and (run == place or place.name == "student"):
            file = run / "resolved.yaml"
            try:
                return _own(read(file)[0])
            except ConfigError:
                raise
            except ValueError as error:
                raise ConfigError(f"{file}: cannot be read ({error}); put back what the run wrote") from None
    return OwnSettings()


def _own(tree: Any) -> OwnSettings:
    """The settings in what a file holds.

    Raises:
        ValueError: it holds something else.
    """
    sections = (
        [tree, *(tree.get(name) or {} for name in ("data", "evaluate"))] if isinstance(tree, dict) else []
    )
    if not sections or not all(isinstance(one, dict) for one in sections):
        raise ValueError("it holds other things than a run writes")
    parts = _parts(tree)
    return OwnSettings(parts["data"], parts["evaluate"])


def _parts(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    wanted = {"data": DATA_FIELDS, "evaluate": EVALUATE_FIELDS}
    return {
        section: {name: values[name] for name in names if name in values}
        for section, names in wanted.items()
        for values in [tree.get(section) or {}]
    }
