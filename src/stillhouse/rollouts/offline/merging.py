"""`stillhouse merge`: the shards of `generate` or of `curate` as one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError
from stillhouse.files import shards_beside
from stillhouse.rollouts.offline.filtered_rows import Count, dropped_path, write_filtered
from stillhouse.rollouts.offline.shards import finished_shards
from stillhouse.rollouts.offline.stage_files import header_differences, read_header, read_rows, write_rows


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was joined.

    Example: `MergeResult(rows=1024, shards=8)`
    """

    rows: int
    shards: int
    kept: int | None = None
    """Prompts that the filters of `curate` keep."""
    counts: tuple[Count, ...] = ()
    """What they drop."""
    written: bool = True
    """False where the file was there already, and shards alone were deleted: those of a killed merge."""


def merge_shards(path: Path) -> MergeResult:
    """Join the shards of a file, which are deleted then.

    Where the file is there already, shards are deleted whose rows are all in it: what a process leaves that
    is killed between the two.

    Raises:
        DataError: see `finished_shards`; or the file is there, and shards hold rows that are not in it.
    """
    if path.exists():
        return _remove_joined(path, shards_beside(path))
    found = finished_shards(path)
    result = MergeResult(len(found.rows), len(found.paths))
    if found.header.get("stage") == "curated":
        kept, counts = write_filtered(path, found.header, found.rows)
        result = MergeResult(len(found.rows), len(found.paths), kept, tuple(counts))
    else:
        write_rows(path, found.header, found.rows.values())
    for shard in found.paths:
        shard.unlink(missing_ok=True)
    return result


def _remove_joined(path: Path, shards: Sequence[Path]) -> MergeResult:
    if not shards:
        return MergeResult(0, 0, written=False)
    header = read_header(path) or {}
    others = [one.name for one in shards if header_differences(header, read_header(one))]
    missing = {_digest(row): one.name for one in shards for row in read_rows(one)}
    rows = len(missing)
    written = [path, dropped_path(path)] if header.get("stage") == "curated" else [path]
    for file in written:
        for row in read_rows(file) if file.exists() else ():
            missing.pop(_digest(row), None)
    if others or missing:
        names = ", ".join(sorted({*others, *missing.values()}))
        raise DataError(
            f"{path}: is there already, and these shards hold other rows or were made in another way: "
            f"{names}. Delete the file to join them anew, or delete them."
        )
    for shard in shards:
        shard.unlink(missing_ok=True)
    return MergeResult(rows, len(shards), written=False)


def _digest(row: Mapping[str, Any]) -> bytes:
    """Of a row of a shard or of the finished file, where `curate` adds why a row is dropped."""
    own = {name: value for name, value in row.get("row", row).items() if name != "dropped"}
    return hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=16).digest()
