"""Every error that Stillhouse raises on purpose: one root, each also a standard-library error.

`exit_code` is what the command line returns: 2 where the user can mend the input, 3 where the
environment failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class StillhouseError(Exception):
    """Root of all deliberate errors. The message is complete: it needs no traceback to be understood."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with what the user gave.

    Example: `Fault("objective.alpha", "must be less than or equal to 1", got="1.5", allowed="0 to 1")`
    """

    path: str
    """Of the field, such as "train.lr", or the option of a command."""
    problem: str
    """What is wrong."""
    got: str | None = None
    """What was given."""
    allowed: str | None = None
    """What may be given."""
    hint: str | None = None
    """What to do, as a sentence."""
    origin: str | None = None
    """Where the value was given, such as "run.yaml:12"."""

    def __str__(self) -> str:
        where = f"{self.path} ({self.origin})" if self.origin else self.path
        parts = [f"{where}: {self.problem}"]
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        text = "; ".join(parts)
        return f"{text}. {self.hint}" if self.hint else text


class ConfigError(StillhouseError, ValueError):
    """The configuration is wrong. Carries every fault that was found, not only the first.

    Picklable, because a launcher may have to carry it between processes.
    """

    def __init__(self, *faults: Fault | str) -> None:
        self.faults: tuple[Fault | str, ...] = faults
        super().__init__(*faults)

    def __str__(self) -> str:
        return listed(self.faults)


class DataError(StillhouseError, ValueError):
    """A data file cannot be used: missing fields, no rows, broken lines. Names the file and the line."""


class RowError(DataError):
    """One row of a data file cannot be used: the field and what is wrong with it.

    Example: `RowError("train.jsonl:7", "field 'prompt' is null", "null in a field")`
    """

    def __init__(self, location: str, problem: str, reason: str) -> None:
        """An error about the row at `location`; `reason` is what such rows are counted under."""
        super().__init__(location, problem, reason)
        self.location, self.problem, self.reason = location, problem, reason

    def __str__(self) -> str:
        return f"{self.location}: {self.problem}"


class ModelError(StillhouseError, ValueError):
    """A model or tokenizer cannot be used: not a model folder, tokenizers that differ, unknown layers."""


class TrainingError(StillhouseError, ArithmeticError):
    """Training cannot go on, for example because the loss is not finite. The last checkpoint is untouched."""


class EngineError(StillhouseError, RuntimeError):
    """Generation failed for a reason outside the configuration, such as an empty prompt."""

    exit_code = 3


class ServerError(StillhouseError, RuntimeError):
    """A model server does not answer, retries included, or answers what nobody can use."""

    exit_code = 3


class RequestRejected(ServerError):
    """The server understood a request and rejects it; a retry would change nothing."""


class TeacherError(StillhouseError, RuntimeError):
    """The teacher's signal could not be had, for example because a cache is damaged."""

    exit_code = 3


class EnvironmentFault(StillhouseError, OSError):
    """The machine refused: disk full, no permission, a package that an option needs is not installed."""

    exit_code = 3

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


def listed(items: Iterable[object]) -> str:
    """One item as it is; several as a list, one a line."""
    lines = [str(item) for item in items]
    return lines[0] if len(lines) == 1 else "\n".join(f"- {line}" for line in lines)
