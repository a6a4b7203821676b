"""Run folders as they lie on disk. Missing files are empty, broken ones are named in `problems`: a report
never fails on them."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from stillhouse.errors import DataError
from stillhouse.report.history import sound

MARKERS = ("state.json", "resolved.yaml", "metrics.jsonl", "data.json", "models.json", "evaluation")
"""A folder that holds one of these is a run folder."""

CHAIN_FILE = "chain.json"
"""What makes a folder that of a chain, with a run folder for each stage."""

Row = dict[str, Any]
EvaluationRows = Literal["responses", "scores", "none"]


@dataclass(frozen=True, slots=True)
class ConfigEntry:
    """One value of the configuration and where it came from.

    Example: `ConfigEntry("train.lr", 0.0005, origin="run.yaml:12")`
    """

    path: str
    value: Any
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One system on one task, as `evaluation/SYSTEM.json` and the rows beside it hold it."""

    system: str
    label: str
    task: str
    settings: Row
    metrics: Row
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything a run folder tells. Example: `load_run(Path("runs/kd")).metrics("valid")[-1]["rouge_l"]`"""

    folder: Path
    state: Row = field(default_factory=dict)
    config: dict[str, ConfigEntry] = field(default_factory=dict)
    """Settings by dotted path."""
    environment: Row = field(default_factory=dict)
    data: list[Row] = field(default_factory=list)
    """One entry a data set: rows, kept, dropped by reason."""
    models: dict[str, Row] = field(default_factory=dict)
    log: list[Row] = field(default_factory=list)
    """Rows of metrics.jsonl in order of step; of a step that was logged twice (a resumed run) the later
    row."""
    evaluations: list[Evaluation] = field(default_factory=list)
    curation: Row = field(default_factory=dict)
    """responses/curation.json: what the filters of each round dropped."""
    warnings: list[str] = field(default_factory=list)
    """What the run itself warned of while it read its data."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, for the reader of the page."""

    @property
    def name(self) -> str:
        """The run's own name, else its folder's."""
        return str(self.state.get("name") or self.folder.name)

    @property
    def recipe(self) -> str:
        """The recipe, or an empty text where the run used none."""
        entry = self.config.get("recipe")
        return str(self.state.get("recipe") or (entry.value if entry else "") or "")

    @property
    def does(self) -> str:
        """What a stage of a chain that trains nothing does; an empty text for a run that trains."""
        return str(self.state.get("stage") or "")

    @property
    def status(self) -> str:
        """running, interrupted, done, failed, or unknown."""
        return status_of(self.state)[0]

    def metrics(self, phase: str) -> list[Row]:
        """The log rows of one phase, "train" or "valid"."""
        return [row for row in self.log if row.get("phase") == phase]


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders among `folders` and, where one is only a parent, those up to three levels below it, by
    name.

    Raises:
        DataError: a folder does not exist, or holds no run.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: is not a folder. Give the folder of a run, such as runs/kd.")
        runs = list(_runs_below(folder, 3))
        if not runs:
            raise DataError(
                f"{folder}: holds no run: neither it nor a folder below it has one of {', '.join(MARKERS)}. "
                "Give a folder that `stillhouse run` wrote."
            )
        found += [run for run in runs if run not in found]
    return found


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    own = [marker for marker in MARKERS if (folder / marker).exists()]
    below: list[Path] = []
    # A parent may keep a shared evaluation beside its runs; only that does not make it a run itself.
    if depth and (not own or own == ["evaluation"]):
        children = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        below = [
            run for child in children if child.name != "evaluation" for run in _runs_below(child, depth - 1)
        ]
        below = _in_order(folder, below)
    if own and not (below and own == ["evaluation"]):
        yield folder
    yield from below


def read_chain(folder: Path) -> Row:
    """The content of chain.json; empty if the folder is not that of a chain, or the file cannot be read."""
    found = sound(_read_json(folder / CHAIN_FILE, []))
    stages, known = found.get("stages"), found.get("known")
    return {
        **found,
        "stages": [one for one in stages if isinstance(one, dict)] if isinstance(stages, list) else [],
        "known": _mappings(known) if isinstance(known, dict) else {},
    }


def _mappings(found: Mapping[str, Any]) -> dict[str, Row]:
    return {name: one for name, one in found.items() if isinstance(one, dict)}


def _in_order(folder: Path, runs: Sequence[Path]) -> list[Path]:
    """Runs below a folder in the order in which they began; stages of a chain in that of the chain."""
    listed = [one.get("name") for one in read_chain(folder)["stages"]]
    places = {folder / str(name): place for place, name in enumerate(listed)}
    return sorted(runs, key=lambda run: (places.get(run, len(places)), _started(run)))


def _started(folder: Path) -> str:
    """When a run began, so that runs stand in the order in which they were made."""
    return str(_read_json(folder / "state.json", []).get("started") or "")


def load_runs(folders: Sequence[Path], *, rows: EvaluationRows = "scores") -> list[RunRecord]:
    """The runs in the folders, as `find_runs` finds and `load_run` reads them."""
    return [load_run(folder, rows=rows) for folder in find_runs(folders)]


def load_run(folder: Path, *, rows: EvaluationRows = "responses") -> RunRecord:
    """Read a run folder; a missing file counts as empty, a broken one is named in `problems`.

    Args:
        folder: the run folder.
        rows: what to keep of each evaluation's rows: everything, the scores by prompt without any text, or
            nothing.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder. Give the folder of a run, such as runs/kd.")
    problems: list[str] = []
    data = _read_json(folder / "data.json", problems)
    models = _read_json(folder / "models.json", problems)
    sets, warnings = data.get("sets"), data.get("warnings")
    return RunRecord(
        folder=folder,
        state=sound(_read_json(folder / "state.json", problems)),
        config=_read_config(folder, problems),
        environment=_read_json(folder / "environment.json", problems),
        data=[entry for entry in sets if isinstance(entry, dict)] if isinstance(sets, list) else [],
        models=_mappings(models),
        log=_latest(_read_lines(folder / "metrics.jsonl", problems)),
        evaluations=_read_evaluations(folder / "evaluation", problems, rows),
        curation=_read_json(folder / "responses" / "curation.json", problems),
        warnings=[str(text) for text in warnings] if isinstance(warnings, list) else [],
        problems=problems,
    )


def _parsed(text: str) -> Any:
    """JSON; a whole number that no float can hold becomes infinite, as one with a point does."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits))


def _read_json(path: Path, problems: list[str]) -> Row:
    if not path.exists():
        return {}
    try:
        value = _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} could not be read ({error}).")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no JSON object.")
        return {}
    return value


def _read_lines(path: Path, problems: list[str]) -> list[Row]:
    if not path.exists():
        return []
    rows, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    if broken:
        problems.append(f"{path.name}: {broken} line{'s' * (broken > 1)} could not be read and are left out.")
    return rows


def _latest(rows: list[Row]) -> list[Row]:
    """One row for each phase and step: a run that was resumed has logged some steps twice."""
    latest: dict[tuple[Any, Any], Row] = {}
    for row in rows:
        if isinstance(row.get("step"), int | float):
            latest[row.get("phase"), row["step"]] = row
    return sorted(latest.values(), key=lambda row: row["step"])


def _read_config(folder: Path, problems: list[str]) -> dict[str, ConfigEntry]:
    provenance = _read_json(folder / "provenance.json", problems)
    if provenance:
        return {
            path: ConfigEntry(path, entry.get("value"), str(entry.get("origin", "")))
            if isinstance(entry, dict)
            else ConfigEntry(path, entry)
            for path, entry in provenance.items()
        }
    path = folder / "resolved.yaml"
    if not path.exists():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} could not be read ({error}).")
        return {}
    return {name: ConfigEntry(name, leaf) for name, leaf in leaves(value)}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of a tree with its dotted path."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from leaves(below, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, value


def _read_evaluations(folder: Path, problems: list[str], rows: EvaluationRows) -> list[Evaluation]:
    found = []
    paths = folder.glob("*.json") if folder.is_dir() else []
    for path in sorted(
        paths, key=lambda path: ("." in path.stem, path.name)
    ):  # further tasks: SYSTEM.TASK.json
        result = _read_json(path, problems)
        if not result:
            continue
        system = str(result.get("system") or path.stem)
        metrics, settings = result.get("metrics"), result.get("settings")
        found.append(
            Evaluation(
                system=system,
                label=str(result.get("label") or system),
                task=str(result.get("task") or ""),
                settings=settings if isinstance(settings, dict) else {},
                metrics=metrics if isinstance(metrics, dict) else {},
                rows=[] if rows == "none" else _read_rows(path.with_suffix(".jsonl"), problems, rows),
            )
        )
    return found


def _read_rows(path: Path, problems: list[str], rows: EvaluationRows) -> list[Row]:
    found = _read_lines(path, problems)
    if rows == "scores":
        return [
            {key: row[key] for key in row if key == "id" or not isinstance(row[key], str | list)}
            for row in found
        ]
    return found


def trained(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs among these that train; all of them if none does."""
    return [run for run in runs if not run.does] or list(runs)


GONE = "its process died without recording how it ended; continue with --resume"
ELSEWHERE = "as recorded in its folder: it was started on another machine"


def running_process(state: Mapping[str, Any]) -> int | None:
    """The process that is at work on the run now, on this machine; None if there is none or it is ours."""
    import psutil

    try:
        if state["state"] != "running" or state["process"] == os.getpid():
            return None
        segments = state.get("segments") or [state]
        began = datetime.datetime.fromisoformat(segments[-1]["started"]).timestamp()
        process = psutil.Process(state["process"])
        # A process id reused after a crash belongs to a process that is younger than the run.
        alive = process.create_time() <= began + 1 and process.status() != psutil.STATUS_ZOMBIE
    except (ValueError, KeyError, TypeError, psutil.Error):
        return None
    return int(state["process"]) if alive else None


def status_of(state: Mapping[str, Any]) -> tuple[str, str]:
    """How a run stands, and a remark on it.

    Returns:
        "running", "interrupted", "done", "failed" or "unknown", with the message of the run, or why what
        its folder says is not believed. A run that says it is running is running only if its process lives.
    """
    state_name, message = str(state.get("state") or "unknown"), str(state.get("message") or "")
    if state_name != "running" or state.get("process") == os.getpid():
        return state_name, message
    if state.get("host") not in (None, platform.node()):
        return state_name, ELSEWHERE
    return ("running", message) if running_process(state) else ("interrupted", GONE)
