"""The run folder: where each file of a run is, written atomically, with the state of the run kept true."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse import __version__, locks
from stillhouse.core.distributed import rank_and_size
from stillhouse.core.versions import installed_version
from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.evaluate.shown_images import with_images_beside
from stillhouse.files import atomic, check_writable, existing_ancestor, read_object, write_json, write_jsonl
from stillhouse.locks import only_one
from stillhouse.report.history import sound
from stillhouse.report.record import running_process
from stillhouse.runs import history
from stillhouse.train.checkpoints import MANIFEST, numbered

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "rouge-score")
"""Packages whose versions can change a result."""
NO_RUN_YET = frozenset({locks.FILE, "responses"})
"""What may lie in the folder of a run that has not started: `cache build` leaves the teacher's responses."""

LOST = {
    "state.json": "when the run was started and with which changes is not known any more",
    "provenance.json": "whether its values have changed since it was started is not checked",
    "inputs.json": "whether its data and models are those that it began with is not checked",
}
"""Records that a resumption needs, and what it does without where one is damaged."""


class RunFolder:
    """The paths of a run's files, and how they are written."""

    def __init__(self, path: Path, main: bool | None = None) -> None:
        """A run folder; of several processes only the main one (rank 0) writes."""
        self.path = path
        self.main = rank_and_size()[0] == 0 if main is None else main
        self.checkpoints = path / "checkpoints"
        self.responses = path / "responses"
        self.student = path / "student"
        self.best = path / "best"
        self.metrics = path / "metrics.jsonl"
        self.report = path / "report.html"
        self._state: dict[str, Any] = {}
        self._start = time.monotonic()

    @contextlib.contextmanager
    def alone(self, option: str = "output.folder") -> Iterator[None]:
        """Keep every other process that works on the folder out of it, from the first look to the end.

        Raises:
            ConfigError: it is a file, or another process is at work in it.
            EnvironmentFault: it is not writable.
        """
        if not self.main:
            yield
            return
        if self.path.is_file():
            raise ConfigError(Fault(option, "is a file, not a folder", got=str(self.path)))
        check_writable(option, self.path)
        hint = "Wait for its end, or choose another folder: name=..."
        with only_one(self.path / locks.FILE, option, self.path, hint):
            yield

    def check(self, resume: bool) -> None:
        """Make sure that the folder can be used; writes nothing.

        Raises:
            ConfigError: it contains a run that is not to be resumed, none that could be, or other files.
        """
        if not self.main:
            return
        is_run = (self.path / "state.json").exists()
        if is_run and not resume:
            raise ConfigError(
                Fault(
                    "output.folder",
                    f"{self.path} already contains a run",
                    hint="Resume it (--resume), choose another name (name=...), or delete the folder.",
                )
            )
        if resume and not is_run:
            left = ""
            if any(numbered(self.checkpoints)):
                left = (
                    "Its state.json is gone, but there are checkpoints: put it back, or write {} into it to "
                    "go on without the record of when it ran."
                )
            raise ConfigError(
                Fault("--resume", f"there is no run in {self.path} to resume", hint=left or None)
            )
        if is_run and (process := self.running()):
            raise ConfigError(Fault("--resume", f"process {process} is still running in {self.path}"))
        for name, lost in LOST.items() if resume else ():
            read_object(self.path / name, lost)
        inside = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if not is_run and (foreign := sorted(inside - NO_RUN_YET)):
            raise ConfigError(
                Fault(
                    "output.folder",
                    f"{self.path} has files of no run ({', '.join(foreign[:3])})",
                    hint="Choose a new or empty folder: name=..., or output.folder=...",
                )
            )

    def running(self) -> int | None:
        """The id of the process that runs it now, on this machine; None if there is none."""
        return running_process(self.saved_state())

    def saved_state(self) -> dict[str, Any]:
        """The content of state.json, without what no run writes there; empty if it cannot be read."""
        return sound(self.read("state.json"))

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty if there is none that can be read."""
        return read_object(self.path / name)

    def facts(self, name: str) -> dict[str, dict[str, Any]]:
        """A JSON file of mappings by name; empty if there is none that can be read."""
        found = self.read(name)
        return found if all(isinstance(one, dict) for one in found.values()) else {}

    def start(
        self, name: str, recipe: str | None, from_step: int = 0, changes: history.Changes | None = None
    ) -> None:
        """Record that the run has started, or goes on from a step with some changed values."""
        facts = {"name": name, "recipe": recipe, "command": _command_line()}
        signs = (self.metrics, self.path / "state.json")
        last_sign = max((path.stat().st_mtime for path in signs if path.exists()), default=0.0)
        self._state = history.begun(self.saved_state(), facts, from_step, changes or {}, last_sign)
        self.write("state.json", self._state)

    def note(self, **facts: Any) -> None:
        """Add facts to the state of the run."""
        self._state.update(facts)
        self.write("state.json", self._state)

    def end(self, state: str, message: str | None = None) -> None:
        """Record how the run has ended: "done", "interrupted" or "failed"."""
        self._state = history.ended(self._state, state, message, time.monotonic() - self._start)
        self.write("state.json", self._state)

    def end_in_place(self) -> None:
        """Overwrite state.json: not atomic, but possible on a full disk."""
        text = json.dumps(self._state)
        with open(self.path / "state.json", "r+", encoding="utf-8") as handle:
            handle.write(text)
            handle.truncate()

    def size(self) -> int:
        """Bytes of the checkpoints and the student."""
        files = [path for place in (self.checkpoints, self.best, self.student) for path in place.rglob("*")]
        return sum(path.stat().st_size for path in files if path.is_file())

    def tidy(self) -> None:
        """Delete what is incomplete: checkpoints without a manifest, folders not yet in place."""
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
        """The file of an evaluation's partial results; None in all processes but the main one."""
        if not self.main:
            return None
        result = self.evaluation(system, task)
        return result.parent / ".partial" / f"{result.stem}{name and f'~{name}'}.jsonl"

    def write_evaluation(
        self, system: str, facts: dict[str, Any], rows: list[dict[str, Any]], task: str | None = None
    ) -> None:
        """Write the result and the responses of one system, and delete its partial results."""
        if not self.main:
            return
        path = self.evaluation(system, task)
        write_jsonl(path.with_name(f"{path.stem}.jsonl"), with_images_beside(rows, path.parent))
        write_json(path, {"system": system, **facts})
        kept = path.parent / ".partial"
        for piece in (*kept.glob(f"{path.stem}.jsonl"), *kept.glob(f"{path.stem}~*.jsonl")):
            piece.unlink()
        if kept.is_dir() and not any(kept.iterdir()):
            kept.rmdir()

    def has_evaluation(self, system: str, task: str | None = None, *, header: str) -> bool:
        """Whether there is a result with this header; it is written after the responses."""
        path = self.evaluation(system, task)
        try:
            return bool(json.loads(path.read_text(encoding="utf-8"))["header"] == header)
        except (OSError, ValueError, KeyError, TypeError):
            return False


def environment() -> dict[str, Any]:
    """Versions and hardware that can change a result."""
    import torch

    versions = {name: installed_version(name) for name in PACKAGES}
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


def check_space(folder: Path, size: int) -> None:
    """Refuse to start on a disk without space for checkpoints and student.

    Raises:
        EnvironmentFault: less than `size` bytes are free.
    """
    free = shutil.disk_usage(existing_ancestor(folder)).free
    if free < size:
        raise EnvironmentFault(
            f"output.folder: the disk of {folder} has {free / 1e6:,.1f} MB free, and checkpoints and student "
            f"need at least {size / 1e6:,.1f} MB. Free some space, choose another folder or lower "
            "train.keep_checkpoints."
        )


def _git_revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _command_line() -> str:
    """The command that this process was started with; a package run by `-m` by its name, not its file."""
    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":
        program = f"python -m {Path(program).parent.name}"
    return " ".join((program, *arguments))
