"""chain.json: which stages a chain has, what each was made from and what it has left, all by digest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse import locks, signals
from stillhouse.errors import ConfigError, EnvironmentFault, Fault, StillhouseError
from stillhouse.files import ROWS_FILE, read_object
from stillhouse.models.fingerprint import HASH_CACHE
from stillhouse.report.record import CHAIN_FILE as FILE
from stillhouse.report.record import read_chain, running_process
from stillhouse.runs import history
from stillhouse.runs.chains.resolve import Chain
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.own_settings import SETTINGS_FILE

OWN_FILES = frozenset({FILE, HASH_CACHE, locks.FILE, "chain.yaml", "report.html"})
"""What a chain's folder holds besides its stages."""
WORDS_ONLY = frozenset({"README.md", SETTINGS_FILE})
"""Files of a student that say how it was measured, and not what it is."""


class ChainFolder(RunFolder):
    """The folder of a chain, with one run folder for each stage."""

    def __init__(self, chain: Chain) -> None:
        """The folder of `chain`, which may not exist yet."""
        super().__init__(chain.folder)
        self.chain = chain
        self.stopped = ""
        """Why it ends before its last stage."""
        self._record = read_chain(self.path)

    @property
    def exists(self) -> bool:
        """Whether there is a chain in it."""
        return (self.path / FILE).is_file()

    def check(self, resume: bool) -> None:
        """Make sure that the folder can be used; writes nothing.

        Raises:
            ConfigError: it contains a chain that is not to be resumed, none that could be, or other files.
        """
        if not self.main:
            return
        if self.exists and not resume:
            hint = "Resume it (--resume), choose another name (name=...), or delete the folder."
            raise ConfigError(Fault("output.folder", f"{self.path} already contains a chain", hint=hint))
        if resume and not self.exists:
            begun = any(self.started(one.name) for one in self.chain.stages)
            hint = f"Its {FILE} is gone, but stages have begun: put it back, or write {{}} into it to go on."
            problem = f"there is no chain in {self.path} to resume"
            raise ConfigError(Fault("--resume", problem, hint=hint if begun else None))
        if resume:
            read_object(
                self.path / FILE, "which stages came to their end, and from what, is not known any more"
            )
        if process := running_process(self._record):
            raise ConfigError(Fault("--resume", f"process {process} is still running in {self.path}"))
        inside = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        foreign = sorted(inside - OWN_FILES)
        if not self.exists and foreign:
            raise ConfigError(
                Fault(
                    "output.folder",
                    f"{self.path} has files of no chain ({', '.join(foreign[:3])})",
                    hint="Choose a new or empty folder: name=..., or output.folder=...",
                )
            )

    def stage(self, name: str) -> dict[str, Any]:
        """What is recorded of a stage: the digests of its `inputs` and of its `output`."""
        found: dict[str, Any] = self._record["known"].get(name, {})
        return found

    def note_stage(self, name: str, **facts: Any) -> None:
        """Record something of a stage; with no facts, forget all."""
        known = dict(self._record["known"])
        known[name] = {**known.get(name, {}), **facts} if facts else {}
        self._write(known=known)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record that the chain has started and, if it fails or is stopped, how and in which stage."""
        start = time.monotonic()
        stages = [{"name": one.name, "what": one.what, "after": list(one.after)} for one in self.chain.stages]
        self._write(
            name=self.chain.name,
            state="running",
            stages=stages,
            started=self._record.get("started") or history.now(),
            ended=None,
            message=None,
            process=os.getpid(),
            host=platform.node(),
            segments=[{"started": history.now()}],
        )

        def end(state: str, message: str | None = None) -> None:
            seconds = round((self._record.get("seconds") or 0.0) + time.monotonic() - start, 3)
            self._write(state=state, message=message, ended=history.now(), seconds=seconds)

        try:
            yield
        except KeyboardInterrupt as error:
            end("interrupted", f"stopped by {signals.name_of(error)}")
            raise
        except Exception as error:
            told = str(error) if isinstance(error, StillhouseError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(EnvironmentFault):  # the error itself is on its way
                end("failed", told)
            raise
        done = all(self.finished(one.name) for one in self.chain.stages)
        end("done" if done else "interrupted", None if done else self.stopped)

    def finished(self, name: str) -> bool:
        """Whether a stage has come to its end."""
        state = RunFolder(self.chain.folder_of(name)).saved_state()
        return state.get("state") == "done" and "output" in self.stage(name)

    def started(self, name: str) -> bool:
        """Whether a stage has begun."""
        return (self.chain.folder_of(name) / "state.json").is_file()

    def _write(self, **facts: Any) -> None:
        self._record = {**self._record, **facts}
        self.write(FILE, self._record)


def output_digest(stage: Path) -> str:
    """32 hexadecimal digits that change with any file of what a stage has left, but for its card.

    Args:
        stage: the folder of the stage.
    """
    whole = hashlib.blake2b(digest_size=16)
    left = stage / "student"
    files = [path for path in left.rglob("*") if path.is_file() and path.name not in WORDS_ONLY]
    for file in sorted([*files, *stage.glob(ROWS_FILE)]):
        with open(file, "rb") as handle:
            content = hashlib.file_digest(handle, "blake2b").hexdigest()
        whole.update(f"{file.relative_to(left if file in files else stage)} {content}\n".encode())
    return whole.hexdigest()
