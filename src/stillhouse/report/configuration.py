"""The settings of runs, where they came from and where they differ, and the machines that they ran on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.config.layers import OF_THE_SWEEP
from stillhouse.console.format import setting_text
from stillhouse.report.history import parent_text, spans, text_of_spans
from stillhouse.report.record import ConfigEntry, RunRecord

NOT_SET = "not set"


@dataclass(frozen=True, slots=True)
class SettingDifference:
    """A setting with its value in each run. Example: `SettingDifference("train.lr", ("0.001", "0.002"))`"""

    path: str
    values: tuple[str, ...]

    @property
    def partial(self) -> bool:
        """Whether only some of the runs have it."""
        return NOT_SET in self.values


def config_diff(runs: Sequence[RunRecord]) -> list[SettingDifference]:
    """Settings that are not the same in all runs; those that all runs have come first.

    Left out are the names of the runs, and defaults of parts that only some of the runs have, which follow
    from the part's kind. A teacher that a sweep shares among its runs is the teacher that they ask for.
    """
    if len(runs) < 2:
        return []
    runs = [replace(run, config=_asked_for(run.config)) for run in runs]
    paths = dict.fromkeys(path for run in runs for path in run.config)
    rows = []
    for path in paths:
        known = [run.config[path] for run in runs if path in run.config]
        follows = len(known) < len(runs) and all(setting.origin == "default" for setting in known)
        values = [value_text(run, path) if path in run.config else NOT_SET for run in runs]
        if len(set(values)) > 1 and not follows and path not in ("name", "output.folder"):
            rows.append(SettingDifference(path, tuple(values)))
    return sorted(rows, key=lambda row: row.partial)


def _asked_for(config: Mapping[str, ConfigEntry]) -> dict[str, ConfigEntry]:
    """The settings without what a sweep has put between a run and its teacher, which changes no result."""
    between = {
        path.partition(".of.")[0]
        for path, entry in config.items()
        if ".of." in path and entry.origin == OF_THE_SWEEP
    }
    found = {}
    for path, entry in config.items():
        owner = next((one for one in between if path.startswith(f"{one}.")), None)
        if owner is None:
            found[path] = entry
        elif path.startswith(f"{owner}.of."):
            found[f"{owner}.{path.removeprefix(f'{owner}.of.')}"] = entry
    return found


def config_tables(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Every setting of every run with its origin; `given` tells those that somebody chose."""
    return [
        {
            "name": run.name,
            "rows": [
                {
                    "path": setting.path,
                    "value": value_text(run, setting.path),
                    "origin": short_path(setting.origin),
                    "given": setting.origin != "default",
                }
                for setting in run.config.values()
            ],
        }
        for run in runs
        if run.config
    ]


def value_text(run: RunRecord, path: str) -> str:
    """A setting of a run, with the values that earlier steps had and the run that its student came from."""
    values = spans(run.state).get(path) or ()
    text = text_of_spans(values) if len(values) > 1 else setting_text(run.config[path].value)
    if path == "student.path" and (parent := parent_text(run.state)):
        return f"{text}, {parent}"
    return text


def short_path(origin: str) -> str:
    """The file's name without its folders: the page may travel further than the machine's paths should."""
    return origin.replace("\\", "/").rsplit("/", 1)[-1] if origin != "command line" else origin


def model_name(path: str) -> str:
    """A model as people write it: a name on the hub or a relative path as it is, of an absolute path the last
    part, with the folder above where that says more than the part itself (`warm-start/student`)."""
    if path.startswith("package:"):
        return path.removeprefix("package:").partition("/")[2] or path
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    if not path.startswith(("/", "~")) and ":" not in path:
        return "/".join(parts[-3:])
    common = parts[-1:] and (parts[-1] in ("student", "model", "final") or parts[-1].startswith("checkpoint"))
    return "/".join(parts[-2:] if common else parts[-1:])


def environments(runs: Sequence[RunRecord]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Versions and machine; runs of the same environment share one list."""
    grouped: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.environment:
            grouped.setdefault(json.dumps(run.environment, sort_keys=True, default=str), []).append(run)
    return [
        (
            "" if len(same) == len(runs) else ", ".join(run.name for run in same),
            [(str(name), setting_text(value)) for name, value in same[0].environment.items()],
        )
        for same in grouped.values()
    ]
