"""Processes that train together have been started with the same values and have read the same rows.

They would wait for one another for ever, or each would train in its own way and the mean of their gradients
would be of no configuration at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from stillhouse.config import flatten
from stillhouse.core.distributed import Ranks, rank_and_size
from stillhouse.errors import ConfigError, Fault
from stillhouse.runs.build import Parts
from stillhouse.runs.config import RunConfig

SAME = "Start all processes with the same file, options and environment; only absolute paths may differ."


def check_same_values(config: RunConfig) -> None:
    """Compare the values of all processes of a run, but absolute paths: a machine may have its own.

    Raises:
        ConfigError: on all of them, with every value that is not the same.
    """
    _compare({path: _without_absolute_paths(value) for path, value in flatten(config).items()})


def check_same_rows(parts: Parts) -> None:
    """Compare the rows that all processes of a run have read, by the digests of the files.

    Raises:
        ConfigError: on all of them, with every set that is not the same.
    """
    sets = {f"data.{one['name']}": one["sha256"] for one in parts.data.report["sets"]}
    _compare({**sets, "data.train (rows)": len(parts.data.train)})


def _without_absolute_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_absolute_paths(item) for item in value]
    return "an absolute path" if isinstance(value, str) and os.path.isabs(value) else value


def _compare(mine: Mapping[str, Any]) -> None:
    every = Ranks(*rank_and_size()).gather(mine)
    paths = sorted({path for values in every for path in values})
    if faults := [fault for path in paths if (fault := _difference(path, every)) is not None]:
        raise ConfigError(*faults)


def _difference(path: str, every: list[Mapping[str, Any]]) -> Fault | None:
    found = [values.get(path) for values in every]
    other = next((rank for rank, value in enumerate(found) if value != found[0]), None)
    if other is None:
        return None
    got = f"{found[0]} in process 0, {found[other]} in process {other}"
    return Fault(path, "is not the same in all processes of the run", got=got, hint=SAME)
