"""The launcher of a command's processes: torchrun, accelerate launch, or who sets RANK and WORLD_SIZE."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from stillhouse.core.distributed import rank_and_size

LAUNCHERS = frozenset({"torchrun", "accelerate", "accelerate-launch", "deepspeed"})
"""Programs whose command line ends with that of the processes they start."""
MODULES = frozenset({"torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"})
"""The same as modules of `python -m`."""


def start_again(words: Sequence[str]) -> str:
    """How a user starts this command again with other words, in as many processes as now.

    Args:
        words: those behind `stillhouse`.

    Returns:
        The command line, behind a remark where it is not all that there is to do.
    """
    _, size = rank_and_size()
    if size == 1:
        return shlex.join(["stillhouse", *words])
    launcher = launcher_words(_command_line_above(), sys.argv[1:])
    if launcher is None:
        return f"(in {size} processes, started as these were) {shlex.join(['stillhouse', *words])}"
    several = int(os.environ.get("GROUP_WORLD_SIZE") or 1) > 1
    remark = "(on every machine with the launcher's options there) " if several else ""
    return remark + shlex.join([*launcher, *words])


def launched_with(option: str) -> bool:
    """Whether the launcher's command line, where it is seen, has an option that begins so, with "-" or "_".

    Example: `launched_with("parallelism_config_")`
    """
    words = launcher_words(_command_line_above(), sys.argv[1:]) or ()
    return any(word.replace("-", "_").startswith(f"__{option}") for word in words)


def launcher_words(above: Sequence[str], own: Sequence[str]) -> list[str] | None:
    """What of a launcher's command line stands before the words of the command that it has started.

    Args:
        above: the command line of the process that has started this one.
        own: the words of this command.

    Returns:
        Those words, with programs by name; None if no launcher is seen there.
    """
    if not own or list(above[-len(own) :]) != list(own):
        return None
    words = list(above[: -len(own)])
    if len(words) > 1 and _is_python(words[0]) and Path(words[1]).name in LAUNCHERS:
        words = words[1:]  # a script of that name, started by its first line
    if words and Path(words[0]).name in LAUNCHERS:
        return [Path(words[0]).name, *words[1:]]
    if len(words) > 2 and words[1] == "-m" and words[2] in MODULES:
        return ["python", *words[1:]]
    return None


def _is_python(program: str) -> bool:
    return Path(program).name.startswith("python")


def _command_line_above() -> list[str]:
    """That of the process that has started this one; empty where it may not be seen."""
    import psutil

    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []
