"""`stillhouse merge`: the shards of `generate` or of `curate` as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stillhouse.rollouts.offline.filtered_rows import Count, write_filtered
from stillhouse.rollouts.offline.shards import finished_shards
from stillhouse.rollouts.offline.stage_files import write_rows


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


def merge_shards(path: Path) -> MergeResult | None:
    """Join the shards of a file, which are deleted then; None if the file is there already.

    Raises:
        DataError: see `finished_shards`.
    """
    if path.exists():
        return None
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
