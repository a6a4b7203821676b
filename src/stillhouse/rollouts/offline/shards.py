"""The shards of a stage file as one: which are missing, unfinished or foreign, and all rows in order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError, listed
from stillhouse.files import shards_beside
from stillhouse.rollouts.offline.indexed_rows import IndexedRows
from stillhouse.rollouts.offline.stage_files import (
    SHARD,
    header_differences,
    read_header,
    shard_path,
)

_PLACE = re.compile(r"\.shard-(\d+)-of-(\d+)(\.part-\d+)?\.jsonl$")


def blocks(total: int, size: int, index: int, count: int) -> list[range]:
    """The blocks of rows that are a shard's: of `count` shards each has every `count`-th block.

    Args:
        total: rows of all shards.
        size: rows of a block, which is always computed as a whole, so that even rounding does not depend on
            the number of shards.
        index: which shard, from 0.
        count: number of shards.
    """
    starts = range(0, total, size)[index::count]
    return [range(start, min(start + size, total)) for start in starts]


@dataclass(frozen=True)
class ShardSet:
    """All shards of a stage file, finished.

    Example: `finished_shards(Path("teacher.jsonl")).rows[17]`
    """

    header: Mapping[str, Any]
    """What they have in common: the header of the whole file."""
    rows: IndexedRows
    paths: Sequence[Path]


def finished_shards(path: Path) -> ShardSet:
    """The shards of `path`, if each is there and finished.

    Raises:
        DataError: there are none, or some are missing, unfinished, or made in another way; the message names
            each of them.
    """
    paths = shards_beside(path)
    if not paths:
        raise DataError(f"{path}: has no shards: there is no {shard_path(path, 0, 1).name} or the like")
    count = max(_place(one)[1] for one in paths)
    headers = {one: read_header(one) for one in paths}
    first = next((header for header in headers.values() if header is not None), {})
    there = {_place(one) for one in paths}
    problems = [
        f"{shard_path(path, index, count).name} is missing: run the command with --shard {index}/{count}"
        for index in range(count)
        if (index, count) not in there
    ]
    for one, header in headers.items():
        if differing := header_differences(first, header):
            problems.append(f"{one.name} is foreign, made in another way: {'; '.join(differing)}")
    total = 0
    for index, of in sorted(there):
        parts = [one for one in paths if _place(one) == (index, of) and headers[one] is not None]
        name, rows = shard_path(path, index, of).name, len(IndexedRows(parts))
        wanted = (headers[parts[0]] or {}).get(SHARD, {}).get("rows", 0) if parts else 1
        total += rows
        if of != count:
            problems.append(f"{name} is one of {of} shards, and others are of {count}: delete it")
        elif rows < wanted:
            told = f"{rows:,} of {wanted:,} rows" if parts else "0 rows"
            problems.append(f"{name} is unfinished, {told}: run the command with --shard {index}/{of} again")
    if problems:
        raise DataError(f"{path}: cannot be joined of its shards:\n{listed(problems)}")
    found = IndexedRows(paths)
    if len(found) != total:
        raise DataError(f"{path}: its shards hold some rows twice, as of commands with another --chunk")
    return ShardSet({name: value for name, value in first.items() if name != SHARD}, found, paths)


def _place(path: Path) -> tuple[int, int]:
    """Index and count in the name of a shard."""
    found = _PLACE.search(path.name)
    assert found is not None
    return int(found.group(1)), int(found.group(2))
