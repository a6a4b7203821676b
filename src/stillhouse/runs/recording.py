"""Keeps state.json true: that a run has started, and however it ends."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from stillhouse import signals
from stillhouse.core import other_processes
from stillhouse.core.lost_peers import lost_peer_fault
from stillhouse.errors import EnvironmentFault, StillhouseError
from stillhouse.runs.folder import RunFolder
from stillhouse.runs.history import Changes
from stillhouse.train.interrupt import Interrupt

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


@contextlib.contextmanager
def recorded(
    folder: RunFolder,
    name: str,
    recipe: str | None = None,
    from_step: int = 0,
    changes: Changes | None = None,
) -> Iterator[Interrupt]:
    """Record in state.json that a run has started and, if it fails, how. Handles signals inside the block.

    Args:
        folder: of the run.
        name: of the run.
        recipe: of the run, if it has one.
        from_step: the step of the checkpoint that it goes on from.
        changes: the values that are others than before.

    Raises:
        EnvironmentFault: in place of any error that means that the disk is full or not writable, or that
            another process of the run has died.
    """
    folder.start(name, recipe, from_step, changes)
    if (others := other_processes.current()) is not None:
        others.on_lost = lambda message: _end(folder, "failed", message)
    try:
        with Interrupt() as interrupt:
            yield interrupt
    except KeyboardInterrupt as error:
        _end_by_signal(folder, error)
        raise
    except StillhouseError as error:
        _end(folder, "failed", str(error))
        raise
    except Exception as error:
        try:
            fault = _disk_fault(error, folder) or lost_peer_fault(error, f"{folder.path}: ")
        except KeyboardInterrupt as stopped:  # torchrun ends the others while they ask which one has died
            _end_by_signal(folder, stopped)
            raise
        _end(folder, "failed", str(fault or f"{type(error).__name__}: {error}"))
        if fault is None:
            raise
        raise fault from error


def _end_by_signal(folder: RunFolder, stopped: KeyboardInterrupt) -> None:
    """Record what a signal has ended, or the death of another process that has brought it about.

    Raises:
        EnvironmentFault: the latter.
    """
    if (fault := other_processes.fault_before_signal()) is not None:
        _end(folder, "failed", str(fault))
        raise fault from stopped
    _end(folder, "interrupted", f"{other_processes.STOPPED} {signals.name_of(stopped)}")


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
