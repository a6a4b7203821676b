"""One process at a time in a folder: a lock that the kernel takes back from whoever dies with it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.errors import ConfigError, EnvironmentFault, Fault
from stillhouse.files import existing_ancestor
from stillhouse.urls import is_remote

FILE = ".lock"
"""The file that is locked in a folder; whoever holds it writes there who it is."""
_NO_LOCKS = frozenset({errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS})
_held: set[int] = set()
_used: dict[tuple[int, int], int] = {}
"""The open files of `use`, by device and inode."""

logger = logging.getLogger("stillhouse")


@contextlib.contextmanager
def only_one(file: Path, option: str, place: Path, hint: str) -> Iterator[None]:
    """Let one process at a time into the block; another is refused at once, and has changed nothing.

    The lock file is deleted afterwards, and folders that were made for it are if nothing else is in them.
    What a killed process leaves of it is no lock: the kernel's lock is on the open file.

    Args:
        file: the file to lock; the folders above it are made.
        option: what the user gave, for the message, such as "output.folder".
        place: what is locked, for the message.
        hint: the way out, for the message.

    Raises:
        ConfigError: another process is in the block; the message has its id and machine.
        EnvironmentFault: the file cannot be written.
    """
    made = _folders_to_make(file.parent)
    try:
        handle = _locked(file, place)
    except OSError as error:
        problem = f"{option}: {place} cannot be written ({error.strerror or error}). Choose another folder."
        raise EnvironmentFault(problem) from error
    if handle is None:
        raise ConfigError(Fault(option, _told(file, place), hint=hint))
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(_myself()).encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # on a disk that has become read-only it stays, unlocked
            file.unlink(missing_ok=True)
        _close(handle)
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def only_one_writes(output: Path, share: str = "") -> contextlib.AbstractContextManager[None]:
    """Let one process at a time write the file of `--output`; see `only_one`.

    Args:
        output: the file.
        share: of several processes that write it together, which one this is.
    """
    if is_remote(output):  # stores have no locks
        return contextlib.nullcontext()
    hint = "Wait for its end, or choose another file."
    return only_one(output.with_name(f".{output.name}{share}{FILE}"), "--output", output, hint)


def only_one_in(folder: Path, option: str) -> contextlib.AbstractContextManager[None]:
    """Let one process at a time work in a folder; see `only_one`."""
    return only_one(folder / FILE, option, folder, "Wait for its end, or choose another folder.")


def is_held(file: Path) -> bool:
    """Whether a process holds the lock of this file now."""
    try:
        handle = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def use(file: Path) -> bool:
    """Note that this process uses a file, until it ends; False if the file is not there.

    Any number of processes may. Where the file system has no locks, nothing is noted.
    """
    try:
        handle = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH)
    found = os.fstat(handle)
    there = _is_at(handle, file)  # `if_unused` may have let it go meanwhile
    if not there or (found.st_dev, found.st_ino) in _used:
        os.close(handle)
    else:
        _used[found.st_dev, found.st_ino] = handle
    return there


@contextlib.contextmanager
def if_unused(file: Path) -> Iterator[bool]:
    """Whether no process uses a file, and none begins to in the block; see `use`.

    Where the file system has no locks, any may.
    """
    try:
        handle = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unused = True
        except OSError:
            unused = False
        yield unused
    finally:
        os.close(handle)


@contextlib.contextmanager
def in_turn(file: Path) -> Iterator[bool]:
    """Let one process at a time into the block; others wait for their turn.

    The file stays, because another process may be waiting for it.

    Yields:
        Whether no other process is in the block: False where the file system has no locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(handle)
    alone = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s: its file system has no locks (%s).", file, error.strerror)
            alone = False
        yield alone
    finally:
        _close(handle)


def _locked(file: Path, place: Path) -> int | None:
    """The locked file, open; None if another process has it."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process has just tidied the folder away
            continue
        _held.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _close(handle)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                _close(handle)
                raise
            logger.warning(
                "%s: its file system has no locks (%s), so two processes that start there at the same moment "
                "would not notice each other. Start one at a time.",
                place,
                error.strerror,
            )
            return handle
        if _is_at(handle, file):
            return handle
        _close(handle)  # the holder before has deleted this file: another one counts by now


def _is_at(handle: int, file: Path) -> bool:
    """Whether an open file is the one of this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(file))
    return False


def _close(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)


def _forget_in_child() -> None:
    """A forked child that outlives a killed parent must not keep its lock."""
    for handle in tuple(_held):
        with contextlib.suppress(OSError):
            _close(handle)


os.register_at_fork(after_in_child=_forget_in_child)


def _folders_to_make(folder: Path) -> list[Path]:
    """The folders that do not exist, the innermost first."""
    above = existing_ancestor(folder)
    return [one for one in (folder, *folder.parents) if one != above and above in one.parents]


def _myself() -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": platform.node(), "since": since}


def _told(file: Path, place: Path) -> str:
    """Who holds the lock, as it has said; it may not have said it yet."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return f"process {found['process']} is still running in {place} (on {found['host']})"
    return f"another process is still running in {place}"
