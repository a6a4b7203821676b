"""The run folder: where each file of a run is, written atomically, with the state of the run kept true."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from stillhouse import __version__
from stillhouse.errors import ConfigError, EnvironmentFault, Fault, StillhouseError
from stillhouse.files import atomic, check_writable, existing_ancestor, write_json, write_jsonl
from stillhouse.report.record import running_process
from stillhouse.runs.config import RunConfig
from stillhouse.train.callbacks import Interrupt
from stillhouse.train.checkpoints import MANIFEST, numbered

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "rouge-score")
"""Packages whose versions can change a result."""
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
DISK_FULL_MESSAGES = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter",
    "file write failed",
    "unexpected pos",
)
"""Parts of the messages of torch and safetensors, which raise no OSError when the disk is full."""


class RunFolder:
    """The paths of a run's files, and how they are written."""

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
        """Make sure that the folder can be used; writes nothing.

        Raises:
            ConfigError: it contains a run that is not to be resumed, or none that could be.
            EnvironmentFault: it is not writable.
        """
        if not self.main:
            return
        if self.path.is_file():
            raise ConfigError(Fault("output.folder", "is a file, not a folder", got=str(self.path)))
        if (self.path / "state.json").exists() and not resume:
            raise ConfigError(
                Fault(
                    "output.folder",
                    f"{self.path} already contains a run",
                    hint="Resume it (--resume), choose another name (name=...), or delete the folder.",
                )
            )
        if resume and not (self.path / "state.json").exists():
            raise ConfigError(Fault("--resume", f"there is no run in {self.path} to resume"))
        if resume and (process := self.running()):
            raise ConfigError(Fault("--resume", f"process {process} is still running in {self.path}"))
        check_writable("output.folder", self.path)

    def running(self) -> int | None:
        """The id of the process that runs it now, on this machine; None if there is none."""
        return running_process(self._saved_state())

    def _saved_state(self) -> dict[str, Any]:
        """The content of state.json; empty if it cannot be read."""
        try:
            state = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def start(self, name: str, recipe: str | None) -> None:
        """Record that the run has started; the changes of earlier resumptions are kept."""
        changed = self._saved_state().get("changed", [])
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

    def record_changes(self, changes: list[str]) -> None:
        """Record the values that the run is resumed with, if they are others than before."""
        if changes:
            self.note(changed=[*self._state["changed"], {"at": _now(), "values": changes}])

    def note(self, **facts: Any) -> None:
        """Add facts to the state of the run."""
        self._state.update(facts)
        self.write("state.json", self._state)

    def end(self, state: str, message: str | None = None) -> None:
        """Record how the run has ended: "done", "interrupted" or "failed"."""
        seconds = round(time.monotonic() - self._start, 3)
        self._state.update(state=state, ended=_now(), seconds=seconds, message=message)
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

    def changes(self, values: dict[str, Any]) -> list[str]:
        """The values that differ from those that the run was started with, as `path (old -> new)`."""
        try:
            original = json.loads((self.path / "provenance.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return []
        before = {path: fact["value"] for path, fact in original.items()}
        now = json.loads(json.dumps(values, default=str))
        return [
            f"{path} ({before.get(path)} -> {now.get(path)})"
            for path in dict.fromkeys((*before, *now))
            if before.get(path) != now.get(path)
        ]

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
        write_jsonl(path.with_name(f"{path.stem}.jsonl"), rows)
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


@contextlib.contextmanager
def recorded(folder: RunFolder, config: RunConfig) -> Iterator[Interrupt]:
    """Record in state.json that a run has started and, if it fails, how. Handles Ctrl-C inside the block.

    Raises:
        EnvironmentFault: in place of any error that means that the disk is full or not writable.
    """
    folder.start(config.name, config.recipe)
    interrupt = Interrupt()
    try:
        with interrupt:
            yield interrupt
    except KeyboardInterrupt:
        _end(folder, "interrupted", "stopped by Ctrl-C")
        raise
    except StillhouseError as error:
        _end(folder, "failed", str(error))
        raise
    except Exception as error:
        fault = _disk_fault(error, folder)
        _end(folder, "failed", str(fault or f"{type(error).__name__}: {error}"))
        if fault is None:
            raise
        raise fault from error


def _disk_fault(error: BaseException, folder: RunFolder) -> EnvironmentFault | None:
    """The message for an error of a disk that is full or not writable; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if number in DISK_FULL or (number is None and any(text in str(error) for text in DISK_FULL_MESSAGES)):
        return EnvironmentFault(
            f"{folder.path}: the disk is full. Free some space, then continue with --resume; "
            "files written earlier are intact."
        )
    if number in NOT_WRITABLE:
        return EnvironmentFault(f"{getattr(error, 'filename', None) or folder.path}: is not writable.")
    return None


def _end(folder: RunFolder, state: str, message: str) -> None:
    folder.tidy()
    try:
        folder.end(state, message)
    except EnvironmentFault:  # the error itself is on its way; the old file can still be overwritten
        with contextlib.suppress(OSError):
            folder.end_in_place()


def environment() -> dict[str, Any]:
    """Versions and hardware that can change a result."""
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
