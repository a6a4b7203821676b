"""Looking after a cache folder: what is in it, whether it is sound, and making room."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.teachers.store.shard import (
    HEAD,
    PATTERN,
    DamagedShard,
    Manifest,
    Shard,
    new_path,
    write_shard,
)

UNFINISHED_SECONDS = 24 * 3600
"""A file that a process began to write and has not finished after this time is left from a kill."""


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What is in one store of a cache folder."""

    folder: Path
    manifest: Manifest
    records: int
    tokens: int
    bytes: int
    shards: int
    last_used: float
    """Seconds since 1970."""


def find_stores(folder: Path) -> dict[Path, Manifest]:
    """The stores of a cache folder that have a legible shard, by their own folders."""
    found = {}
    for path in sorted(folder.glob(f"*/{PATTERN}")):
        if path.parent not in found and (shard := _opened(path)) is not None:
            found[path.parent] = shard.manifest
    return found


def list_stores(folder: Path) -> list[StoreInfo]:
    """What is in each of `find_stores`, the most recently used first."""
    found = [_info(store, manifest) for store, manifest in find_stores(folder).items()]
    return sorted(found, key=lambda info: -info.last_used)


def _info(folder: Path, manifest: Manifest) -> StoreInfo:
    shards = [shard for path in folder.glob(PATTERN) if (shard := _opened(path)) is not None]
    rows = {key: rows for shard in shards for key, (rows, _) in shard.records().items()}
    return StoreInfo(
        folder=folder,
        manifest=manifest,
        records=len(rows),
        tokens=sum(rows.values()),
        bytes=_size(folder.iterdir()),
        shards=len(shards),
        last_used=max((_last_used(shard.path) for shard in shards), default=0.0),
    )


def _opened(path: Path) -> Shard | None:
    with contextlib.suppress(DamagedShard, FileNotFoundError):  # which `verify` names; merged meanwhile
        return Shard(path)
    return None


def verify(folder: Path) -> Iterator[tuple[Path, int, list[str]]]:
    """Read every byte: for each file the number of sound records, and what is damaged."""
    for path in sorted([*folder.glob(f"*/{PATTERN}"), *folder.glob(f"*/{HEAD}")]):
        try:
            shard = Shard(path)
        except FileNotFoundError:  # merged by another process meanwhile
            continue
        except (OSError, DamagedShard) as error:
            yield path, 0, [str(error)]
            continue
        records = shard.records()
        damaged = [key for key in records if shard.read(key) is None]
        yield path, len(records) - len(damaged), [f"{path}: record {key} is damaged" for key in damaged]


def repair(path: Path) -> None:
    """Write the sound records of a damaged shard to a new one, and remove it.

    Whoever has it mapped still reads it. A head is removed whole: a teacher that is available writes it anew.
    """
    if (shard := _opened(path)) is not None:
        sound = {key: record for key in shard.records() if (record := shard.read(key)) is not None}
        if sound and path.name != HEAD:
            fresh, times = new_path(path.parent), path.stat()
            write_shard(fresh, shard.manifest, sound)
            os.utime(fresh, ns=(times.st_atime_ns, times.st_mtime_ns))  # repairing it is not using it
    path.unlink(missing_ok=True)


def prune(folder: Path, limit: int | None = None, teacher: str | None = None) -> int:
    """Make room. Processes that use the stores go on, and write anew what they need.

    Args:
        folder: the cache folder.
        limit: bytes that all stores together may keep; shards that were not used for longest go first.
        teacher: the beginning of a fingerprint; all stores of that teacher go.

    Returns:
        Bytes freed.
    """
    before = _size(folder.glob("*/*"))
    for store, manifest in find_stores(folder).items():
        if teacher is not None and manifest.fingerprint.startswith(teacher):
            shutil.rmtree(store, ignore_errors=True)  # a process may be writing to it, and begin it anew
    for path in folder.glob("*/.*.tmp"):
        if time.time() - _last_used(path) > UNFINISHED_SECONDS:
            path.unlink(missing_ok=True)
    if limit is not None:
        for path in sorted(folder.glob(f"*/{PATTERN}"), key=_last_used):
            if _size(folder.glob("*/*")) <= limit:
                break
            path.unlink(missing_ok=True)
            if not any(path.parent.glob(PATTERN)):
                shutil.rmtree(path.parent, ignore_errors=True)  # a head is worth nothing without records
    return before - _size(folder.glob("*/*"))


def _last_used(path: Path) -> float:
    """When a file was written, or read by a process that has ended since; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _size(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
