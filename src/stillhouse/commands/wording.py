"""Faults in the words of the command line, for verbs that build a configuration from their options."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from stillhouse.errors import ConfigError, DataError, Fault

LIVE_TEACHER = "teacher: {kind: live, path: FOLDER}"
"""How hints name the part of a configuration that the option for the teacher stands for."""


@contextlib.contextmanager
def as_options(options: Mapping[str, str]) -> Iterator[None]:
    """Name the options that places of a configuration stand for; an option wrong in two places is told once.

    Args:
        options: the option of each place, such as {"student.path": "MODEL"}; "data.train" is among them.
    """
    try:
        yield
    except ConfigError as error:
        found = [_as_option(fault, options) for fault in error.faults]
        raise ConfigError(*dict.fromkeys(found)) from error
    except DataError as error:
        raise DataError(str(error).replace("data.train", options["data.train"])) from error


def _as_option(fault: Fault | str, options: Mapping[str, str]) -> Fault | str:
    if isinstance(fault, Fault):
        path = options.get(fault.path, fault.path.replace("evaluate.tasks", "--tasks"))
        hint = "Set a lower --max-tokens." if path == "--max-tokens" and fault.hint else fault.hint
        if hint and "teacher.path" in options:
            hint = hint.replace(LIVE_TEACHER, f"{options['teacher.path']} FOLDER")
        return replace(fault, path=path, hint=hint, origin=None)
    place, _, rest = fault.partition(": ")
    if place in options:
        return f"{options[place]}: {rest}"
    return fault.replace("evaluate.tasks", "--tasks")
