"""The run folder: everything that a run leaves, each file written atomically."""

from __future__ import annotations

import datetime
import json
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
from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.files import atomic, write_json, write_jsonl
from stillhouse.report.record import running_process
from stillhouse.train.checkpoints import MANIFEST, numbered

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

    def check(self, resume: bool) -> None:
        """Make sure that the folder may be used; nothing is written yet.

        Raises:
            ConfigError: there is a run in it already, and it was not asked to go on with it.
            EnvironmentFault: it cannot be written.
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
        if resume and (process := self.running()):
            raise ConfigError(Fault("--resume", f"process {process} is still at work in {self.path}"))
        check_writable("output.folder", self.path)

    def running(self) -> int | None:
        """The process that is at work on the run now, on this machine."""
        return running_process(self._kept_state())

    def _kept_state(self) -> dict[str, Any]:
        """What state.json holds; nothing if it cannot be read."""
        try:
            state = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def begin(self, name: str, recipe: str | None) -> None:
        """Note that the run has started; with which values it was gone on before stays known."""
        changed = self._kept_state().get("changed", [])
        self._state = {
            "state": "running",
            "name": name,
            "recipe": recipe,
            "started": _now(),
            "ended": None,
            "seconds": None,
            "command": " ".join(sys.argv),
            "process": os.getpid(),
            "host": platform.node(),
            "message": None,
            "changed": changed,
        }
        self.write("state.json", self._state)

    def gone_on_with(self, changes: list[str]) -> None:
        """Note which values are others than before, as `changes` tells them, now that the run goes on."""
        if changes:
            self.note(changed=[*self._state["changed"], {"at": _now(), "values": changes}])

    def note(self, **facts: Any) -> None:
        """Add facts to the state of a run that is going on."""
        self._state.update(facts)
        self.write("state.json", self._state)

    def end(self, state: str, message: str | None = None) -> None:
        """Note how the run has ended: "done", "interrupted" or "failed"."""
        seconds = round(time.monotonic() - self._start, 3)
        self._state.update(state=state, ended=_now(), seconds=seconds, message=message)
        self.write("state.json", self._state)

    def end_in_place(self) -> None:
        """Write state.json over itself: not atomic, but possible where the disk takes no new file."""
        text = json.dumps(self._state)
        with open(self.path / "state.json", "r+", encoding="utf-8") as handle:
            handle.write(text)
            handle.truncate()

    def size(self) -> int:
        """Bytes that checkpoints and student take already."""
        kept = [path for place in (self.checkpoints, self.best, self.student) for path in place.rglob("*")]
        return sum(path.stat().st_size for path in kept if path.is_file())

    def changes(self, values: dict[str, Any]) -> list[str]:
        """Which of these values the run in the folder did not begin with, as `path (old -> new)`."""
        try:
            began = json.loads((self.path / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return []
        before = {path: fact["value"] for path, fact in began.items()}
        now = json.loads(json.dumps(values, default=str))
        return [
            f"{path} ({before.get(path)} -> {now.get(path)})"
            for path in dict.fromkeys((*before, *now))
            if before.get(path) != now.get(path)
        ]

    def tidy(self) -> None:
        """Delete what is half-written: checkpoints without a manifest, folders not yet in place."""
        if not self.main:
            return
        unfinished = [self.path / ".student.new", self.path / ".best.new"]
        unfinished += [found for found in numbered(self.checkpoints) if not (found / MANIFEST).is_file()]
        for folder in unfinished:
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the folder."""
        if self.main:
            write_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the folder."""
        if self.main:
            with atomic(self.path / name) as handle:
                handle.write(text)

    def evaluation(self, system: str, task: str | None = None) -> Path:
        """The result of a system ("teacher", "student before", ...) on the held-out prompts, or on a task."""
        slug = system.replace(" ", "-") + (f".{task}" if task else "")
        return self.path / "evaluation" / f"{slug}.json"

    def partial(self, system: str, task: str | None = None, name: str = "") -> Path | None:
        """Where an evaluation that is going on keeps what it has; the main process alone keeps anything."""
        if not self.main:
            return None
        result = self.evaluation(system, task)
        return result.parent / ".partial" / f"{result.stem}{name and f'~{name}'}.jsonl"

    def write_evaluation(
        self, system: str, facts: dict[str, Any], rows: list[dict[str, Any]], task: str | None = None
    ) -> None:
        """Write the result and the answers of one system; what was kept on the way there goes."""
        if not self.main:
            return
        path = self.evaluation(system, task)
        write_jsonl(path.with_name(f"{path.stem}.jsonl"), rows)
        write_json(path, {"system": system, **facts})
        kept = path.parent / ".partial"
        for piece in (*kept.glob(f"{path.stem}.jsonl"), *kept.glob(f"{path.stem}~*.jsonl")):
            piece.unlink()
        if kept.is_dir() and not any(kept.iterdir()):
            kept.rmdir()

    def has_evaluation(self, system: str, task: str | None = None, *, header: str) -> bool:
        """Whether a system has been evaluated under this header; the result is written after the answers."""
        path = self.evaluation(system, task)
        try:
            return bool(json.loads(path.read_text(encoding="utf-8"))["header"] == header)
        except (OSError, ValueError, KeyError, TypeError):
            return False


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


def existing(folder: Path) -> Path:
    """The folder itself, or else the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_writable(name: str, folder: Path) -> None:
    """Refuse a folder in which nothing can be made.

    Raises:
        ConfigError: there is a file in its place, or in that of a folder above it.
        EnvironmentFault: it may not be written.
    """
    place = existing(folder)
    if not place.is_dir():
        raise ConfigError(Fault(name, f"{place} is not a folder", got=str(folder)))
    if not os.access(place, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"{name}: {place} may not be written. Choose another folder.")


def check_file(name: str, path: Path, ending: str) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Args:
        name: what gave the path, such as "--output".
        path: the file.
        ending: that its name must have; what stands beside it has another.

    Raises:
        ConfigError: it ends otherwise, is a folder, or there is a file in the place of its folder.
        EnvironmentFault: its folder may not be written.
    """
    if path.is_dir():
        raise ConfigError(Fault(name, "is a folder, not a file", got=str(path), hint="Name a file in it."))
    if path.suffix != ending:
        raise ConfigError(Fault(name, f"must end in {ending}", got=str(path)))
    check_writable(name, path.parent)


def needs_space(folder: Path, size: int) -> None:
    """Refuse to start where checkpoints and student cannot fit.

    Raises:
        EnvironmentFault: less than `size` bytes are free.
    """
    free = shutil.disk_usage(existing(folder)).free
    if free < size:
        raise EnvironmentFault(
            f"output.folder: the disk of {folder} has {free / 1e6:,.1f} MB free, and checkpoints and student "
            f"need at least {size / 1e6:,.1f} MB. Free some space, choose another folder or lower "
            "train.keep_checkpoints."
        )


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
