"""Keeps state.json true: that a run has started, and however it ends."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from stillhouse import signals
from stillhouse.core import other_processes
from stillhouse.core.distributed import rank_and_size
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
PROCESS_GONE_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
    "Socket closed",
    "Connection refused",
)
"""Parts of the messages of gloo and NCCL where another process of the run has died."""


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
            fault = _disk_fault(error, folder) or _process_fault(error, folder)
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


def _process_fault(error: BaseException, folder: RunFolder) -> EnvironmentFault | None:
    """The message for an error of a process whose peer has gone; None for other errors."""
    rank, processes = rank_and_size()
    if processes == 1 or not any(text in str(error) for text in PROCESS_GONE_MESSAGES):
        return None
    others = other_processes.current()
    if others is not None and (lost := others.why()) is not None:
        return EnvironmentFault(f"{folder.path}: {lost}. {other_processes.GO_ON}")
    told = str(error).strip().splitlines()[0][:200]
    return EnvironmentFault(
        f"{folder.path}: another of the {processes} processes of the run has died or cannot be reached, as "
        f"process {rank} sees ({told}). Its own output says why; if it has none, the "
        "kernel may have killed it for memory. Continue with --resume from the last checkpoint."
    )


def _end(folder: RunFolder, state: str, message: str) -> None:
    folder.tidy()
    try:
        folder.end(state, message)
    except EnvironmentFault:  # the error itself is on its way; the old file can still be overwritten
        with contextlib.suppress(OSError):
            folder.end_in_place()
