"""Keeps the run folder true whatever happens: what state the run is in, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from stillhouse.errors import EnvironmentFault, StillhouseError
from stillhouse.runs.config import RunConfig
from stillhouse.runs.folder import RunFolder
from stillhouse.train.callbacks import Interrupt

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
TORN = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter",
    "file write failed",
    "unexpected pos",
)
"""What the writers of torch and safetensors say, which raise no OSError, where the disk takes no more."""


@contextlib.contextmanager
def recorded(folder: RunFolder, config: RunConfig) -> Iterator[Interrupt]:
    """Note in state.json that a run is going on and, if it fails, how; Ctrl-C is handled inside the block.

    Raises:
        EnvironmentFault: in place of any error that means that the disk is full or may not be written.
    """
    folder.begin(config.name, config.recipe)
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
        refused = refusal(error, folder)
        _end(folder, "failed", str(refused or f"{type(error).__name__}: {error}"))
        if refused is None:
            raise
        raise refused from error


def refusal(error: BaseException, folder: RunFolder) -> EnvironmentFault | None:
    """The message for an error that comes from a disk that is full or may not be written; None for others."""
    number = error.errno if isinstance(error, OSError) else None
    if number in FULL or (number is None and any(words in str(error) for words in TORN)):
        return EnvironmentFault(
            f"{folder.path}: the disk is full. Free some space, then go on with --resume; "
            "what was written before is intact."
        )
    if number in REFUSED:
        return EnvironmentFault(f"{getattr(error, 'filename', None) or folder.path}: may not be written.")
    return None


def _end(folder: RunFolder, state: str, message: str) -> None:
    folder.tidy()
    try:
        folder.end(state, message)
    except EnvironmentFault:  # the error itself is on its way; the old file's own space may still be written
        with contextlib.suppress(OSError):
            folder.end_in_place()
