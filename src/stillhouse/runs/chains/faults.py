"""Errors of a stage with its name in front."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from stillhouse.errors import ConfigError, DataError, Fault, RowError, StillhouseError
from stillhouse.runs.resolve import STAGES


@contextlib.contextmanager
def in_stage(name: str, meant: Mapping[str, str] | None = None) -> Iterator[None]:
    """Say in which stage an error is.

    Args:
        name: of the stage.
        meant: texts in messages, such as the folder of a stand-in -> what the user calls it.
    """

    def reworded(text: str) -> str:
        for found, word in (meant or {}).items():
            text = text.replace(found, word)
        return text

    def with_stage(fault: Fault | str) -> Fault | str:
        if isinstance(fault, str):
            return f"{STAGES}.{name}.{reworded(fault)}"
        texts = {key: reworded(text) for key in ("problem", "got", "hint") if (text := getattr(fault, key))}
        return replace(fault, path=f"{STAGES}.{name}.{fault.path}", **texts)

    try:
        yield
    except ConfigError as error:
        raise ConfigError(*map(with_stage, error.faults)) from error
    except StillhouseError as error:
        kind = DataError if isinstance(error, RowError) else type(error)
        raise kind(f"{STAGES}.{name}: {reworded(str(error))}") from error
