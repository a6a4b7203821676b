"""The folder of a sweep: where its runs, logs and shared results are, and how each run stands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from stillhouse import locks
from stillhouse.errors import ConfigError, Fault
from stillhouse.files import atomic, check_writable, read_object, write_json
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.history import now

FILE = "sweep.json"
OWN = frozenset({FILE, "sweep.yaml", "runs", "logs", "shared", "trials.jsonl", "report.html", locks.FILE})

RunState = Literal["to do", "running", "interrupted", "stopped early", "failed", "done"]


class SweepFolder:
    """The paths of a sweep's files, and `sweep.json`: what its runs are and how each stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shared = path / "shared"
        self.journal = path / "trials.jsonl"
        self.report = path / "report.html"
        self.lines: dict[str, dict[str, Any]] = {}
        """Run -> what `sweep.json` says of it: choices, state, message."""

    def run(self, name: str) -> Path:
        """The folder of one run."""
        return self.path / "runs" / name

    def log(self, name: str) -> Path:
        """What one run has printed."""
        return self.path / "logs" / f"{name}.log"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out, and refuse a folder with files of something else.

        Raises:
            ConfigError: another process works on it, or it holds other files.
            EnvironmentFault: it is not writable.
        """
        check_writable("folder", self.path)
        inside = {one.name for one in self.path.iterdir()} if self.path.is_dir() else set()
        if foreign := sorted(name for name in inside - OWN if not name.startswith(".")):
            raise ConfigError(
                Fault(
                    "folder",
                    f"{self.path} has files of no sweep ({', '.join(foreign[:3])})",
                    hint="Choose a new or empty folder: name=..., or folder=...",
                )
            )
        with locks.only_one_in(self.path, "folder"):
            yield

    def read(self, tell: bool = False) -> dict[str, Any]:
        """The content of sweep.json, its `runs` mappings by name; what cannot be read is left out.

        Args:
            tell: say so where the file is there and cannot be read.
        """
        lost = "how its runs stood is seen in their folders alone" if tell else None
        found = read_object(self.path / FILE, lost)
        runs = found.get("runs")
        lines = runs.items() if isinstance(runs, dict) else ()
        return {**found, "runs": {name: line for name, line in lines if isinstance(line, dict)}}

    def start(self, yaml: str, facts: Mapping[str, Any]) -> None:
        """Write down what the sweep is."""
        before = self.read()
        self._facts = {"started": before.get("started") or now(), **facts}
        self.lines = before["runs"]
        with atomic(self.path / "sweep.yaml") as handle:
            handle.write(yaml)
        self.write()

    def note(self, name: str, **facts: Any) -> None:
        """Write down how a run stands."""
        self.lines[name] = {**self.lines.get(name, {}), **facts}
        self.write()

    def write(self) -> None:
        """Write sweep.json."""
        write_json(self.path / FILE, {**self._facts, "runs": self.lines})

    def state_of(self, name: str) -> tuple[RunState, str]:
        """How a run stands, by its own folder, and its message; "stopped early" is known here alone."""
        line = self.lines.get(name, {})
        if line.get("state") == "stopped early":
            return "stopped early", str(line.get("message", ""))
        folder = RunFolder(self.run(name))
        saved = folder.saved_state()
        message = str(saved.get("message") or "")
        match saved.get("state"):
            case "done":
                return "done", ""
            case "failed":
                return "failed", message
            case "running" if folder.running() is not None:
                return "running", message
            case "running" | "interrupted":
                return "interrupted", message
        if line.get("state") == "failed":  # before its folder was begun
            return "failed", str(line.get("message", ""))
        return "to do", ""
