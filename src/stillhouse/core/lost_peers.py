"""What gloo and NCCL raise where another process has died, as a fault that names the dead one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from stillhouse.core import other_processes
from stillhouse.core.distributed import rank_and_size
from stillhouse.errors import EnvironmentFault, StillhouseError

MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "Timed out waiting",
    "Socket closed",
    "Connection refused",
)
"""Parts of the messages of gloo and NCCL where another process of the command has died."""


@contextlib.contextmanager
def lost_peers_as_faults() -> Iterator[None]:
    """Turn the error of a collective operation whose peer has gone into a fault.

    Raises:
        EnvironmentFault: another process of the command has died or cannot be reached.
    """
    try:
        yield
    except StillhouseError:
        raise
    except RuntimeError as error:
        if (fault := lost_peer_fault(error)) is None:
            raise
        raise fault from error


def lost_peer_fault(error: BaseException, where: str = "") -> EnvironmentFault | None:
    """The fault for an error of a process whose peer has gone; None for other errors.

    Args:
        error: what was raised.
        where: the beginning of the message, such as the folder of a run.
    """
    rank, processes = rank_and_size()
    if processes == 1 or not any(text in str(error) for text in MESSAGES):
        return None
    others = other_processes.current()
    if others is not None and (lost := others.why()) is not None:
        return EnvironmentFault(f"{where}{lost}. {other_processes.GO_ON}")
    told = str(error).strip().splitlines()[0][:200]
    return EnvironmentFault(
        f"{where}another of the {processes} processes has died or cannot be reached, as process {rank} sees "
        f"({told}). {other_processes.ITS_OUTPUT}. {other_processes.GO_ON}"
    )
