"""The run folder: everything that a run leaves, each file written atomically."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from stillhouse import __version__
from stillhouse.config import Part
from stillhouse.errors import ConfigError, Fault
from stillhouse.files import atomic, write_json, write_jsonl

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "rouge-score")


class RunFolder:
    """Knows where each file of a run is, and writes them."""

    def __init__(self, path: Path, main: bool | None = None) -> None:
        """A run folder; of several processes only the main one (rank 0) writes."""
        self.path = path
        self.main = os.environ.get("RANK", "0") == "0" if main is None else main
        self.checkpoints = path / "checkpoints"
        self.responses = path / "responses"
        self.student = path / "student"
        self.best = path / "best"
        self.metrics = path / "metrics.jsonl"
        self.report = path / "report.html"
        self._state: dict[str, Any] = {}
        self._start = time.monotonic()

    def open(self, resume: bool) -> None:
        """Make the folder, or make sure that it may be used.

        Raises:
            ConfigError: there is a run in it already, and it was not asked to go on with it.
        """
        if not self.main:
            return
        if self.path.is_file():
            raise ConfigError(Fault("output.folder", "is a file, not a folder", got=str(self.path)))
        if (self.path / "state.json").exists() and not resume:
            raise ConfigError(
                Fault(
                    "output.folder",
                    f"{self.path} holds a run already",
                    hint="Go on with it (--resume), choose another name (name=...), or delete the folder.",
                )
            )
        if resume and not (self.path / "state.json").exists():
            raise ConfigError(Fault("--resume", f"there is no run in {self.path} to go on with"))
        self.path.mkdir(parents=True, exist_ok=True)

    def begin(self, name: str, recipe: str | None) -> None:
        """Note that the run has started."""
        self._state = {
            "state": "running",
            "name": name,
            "recipe": recipe,
            "started": _now(),
            "ended": None,
            "seconds": None,
            "command": " ".join(sys.argv),
            "process": os.getpid(),
            "message": None,
        }
        self.write("state.json", self._state)

    def end(self, state: str, message: str | None = None) -> None:
        """Note how the run has ended: "done", "interrupted" or "failed"."""
        seconds = round(time.monotonic() - self._start, 3)
        self._state.update(state=state, ended=_now(), seconds=seconds, message=message)
        self.write("state.json", self._state)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the folder."""
        if self.main:
            write_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the folder."""
        if self.main:
            with atomic(self.path / name) as handle:
                handle.write(text)

    def write_evaluation(self, system: str, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Write the result and the answers of one system ("teacher", "student before", "student after")."""
        if not self.main:
            return
        slug = system.replace(" ", "-")
        write_jsonl(self.path / "evaluation" / f"{slug}.jsonl", rows)
        write_json(self.path / "evaluation" / f"{slug}.json", {"system": system, **facts})

    def has_evaluation(self, system: str) -> bool:
        """Whether a system has been evaluated; the result is written after the answers."""
        return (self.path / "evaluation" / f"{system.replace(' ', '-')}.json").exists()


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they can change a result."""
    import torch

    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "stillhouse": __version__,
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git": _git_revision(),
    }


def default_folder(config: Any) -> Path:
    """runs/NAME unless the configuration says otherwise."""
    return Path(config.output.folder or Path("runs") / config.name)


def needs_space(folder: Path, size: int) -> None:
    """Refuse to start where the first checkpoint cannot fit.

    Raises:
        ConfigError: less than `size` bytes are free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConfigError(
            Fault(
                "output.folder",
                f"the disk of {folder} has {free / 1e9:.1f} GB free",
                allowed=f"at least {size / 1e9:.1f} GB for checkpoints and the student",
                hint="Choose another folder or lower train.keep_checkpoints.",
            )
        )


def dump(part: Part) -> dict[str, Any]:
    """A part as plain data."""
    return part.model_dump(mode="json")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git_revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
