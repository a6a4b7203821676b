"""A folder of shards that any number of processes read and add to, without locks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stillhouse.errors import EnvironmentFault
from stillhouse.files import atomic
from stillhouse.teachers.store.shard import (
    PATTERN,
    DamagedShard,
    Manifest,
    Record,
    Shard,
    key_hash,
    new_path,
    serialised,
)

SHARD_BYTES = 128 * 2**20
MERGED_FILES = 256
RECENT = 64
"""Shards that are looked through one by one before they are indexed."""
RETRIES = 10
"""How often a folder is listed again whose shards another process merges meanwhile."""

logger = logging.getLogger("stillhouse")


class Store:
    """Records by key, where a key is a hash of the text which the record is about.

    Each `put` writes a shard of its own, so that a process that is killed loses no more than what it was just
    writing. Small ones are merged by the process that wrote them. A record is checked against its checksum
    whenever it is read; a damaged one is named in a warning and from then on missing.

    Example:
        >>> with Store(folder, Manifest("hidden-float32", fingerprint)) as store:
        ...     store.put({key: Record(rows, {"hidden": hidden})})
        ...     store.get(key)
    """

    def __init__(
        self, folder: Path, manifest: Manifest, limit: int | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Open a store; nothing is written before the first `put`.

        Args:
            folder: where the shards are; need not exist yet.
            manifest: what its shards say about it; shards of another store are not used.
            limit: bytes of all shards together beyond which nothing is added any more.
            shard_bytes: small shards are merged up to about this size.
        """
        self.folder = folder
        self.damaged = 0
        """Damaged records and shards that were found."""
        self._manifest = manifest
        self._limit = limit
        self._shard_bytes = shard_bytes
        self._shards: dict[Path, Shard] = {}
        self._indexed: list[Shard] = []
        self._hashes = np.empty(0, dtype=np.uint64)
        self._holders = np.empty(0, dtype=np.uint32)
        self._recent: list[Shard] = []
        """Shards that `_hashes` has not yet."""
        self._unusable: set[Path] = set()
        self._small: list[Path] = []
        self._small_bytes = 0
        self._refused: set[str] = set()
        self._read_from: set[Path] = set()
        self._warned: set[str] = set()
        self._bytes = 0
        self.refresh()
        self._index()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        self._index()
        return len(np.unique(self._hashes))

    def __contains__(self, key: str) -> bool:
        return self._holder(key) is not None

    @property
    def size(self) -> int:
        """Bytes of all shards, as last seen."""
        return self._bytes

    @property
    def refused(self) -> int:
        """Records that were not stored because of `limit`."""
        return len(self._refused)

    def get(self, key: str) -> Record | None:
        """The record of a key, without a copy; None if it is not there or is damaged."""
        shard = self._holder(key)
        if shard is None:
            return None
        record = shard.read(key)
        if record is not None:
            self._read_from.add(shard.path)
            return record
        self.damaged += 1
        self._warn(
            f"{shard.path}: record {key} is damaged and not used; it is computed anew where the teacher is "
            "available. `stillhouse cache verify --repair` removes it."
        )
        shard.forget(key)
        return self.get(key)

    def put(self, records: Mapping[str, Record]) -> int:
        """Add records in one write; how many were stored.

        A key that is there already is left as it is. Beyond the size limit nothing is stored.

        Raises:
            EnvironmentFault: the disk is full or the folder cannot be written.
        """
        new = {key: record for key, record in records.items() if key not in self}
        if not new:
            return 0
        data = serialised(self._manifest, new)
        if self._limit is not None and self._bytes + len(data) > self._limit:
            self._refused |= new.keys()
            self._warn(
                f"{self.folder}: holds {self._bytes / 1e6:,.1f} MB and may not grow beyond "
                f"{self._limit / 1e6:,.1f} MB; what is new is computed but not stored. Raise teacher.limit, "
                "or make room with `stillhouse cache prune`."
            )
            return 0
        path = self._write(data)
        if len(data) < self._shard_bytes // 16:
            self._small.append(path)
            self._small_bytes += len(data)
        if len(self._recent) > RECENT:
            self._index()
        if len(self._small) >= MERGED_FILES or self._small_bytes >= self._shard_bytes:
            self._merge()
        return len(new)

    def refresh(self) -> None:
        """See what other processes have written, merged or removed."""
        for _ in range(RETRIES):
            present = set(self.folder.glob(PATTERN))
            if all([self._open(path) for path in present - self._shards.keys() - self._unusable]):
                break
        gone = self._shards.keys() - present
        for path in gone:
            del self._shards[path]
        if gone or len(self._recent) > RECENT:
            self._index()
        self._bytes = sum(shard.size for shard in self._shards.values())

    def close(self) -> None:
        """Merge the small shards that this process has written, and note which shards were read."""
        self._merge()
        for path in self._read_from:
            if path.is_symlink():  # into a store that is only looked at
                continue
            with contextlib.suppress(OSError):  # gone, or a folder that may only be read
                os.utime(path)
        self._read_from.clear()
        self._shards.clear()  # tensors that are still in use keep their map
        self._index()

    def _open(self, path: Path) -> bool:
        """Map a shard and note its records, if it can be used; False if it is gone."""
        try:
            shard = Shard(path)
        except FileNotFoundError:
            return False
        except (OSError, DamagedShard) as error:
            self.damaged += isinstance(error, DamagedShard)
            self._ignore(path, str(error))
            return True
        if shard.manifest.same_store(self._manifest):
            self._shards[path] = shard
            self._recent.append(shard)
        else:
            self._ignore(path, f"{path}: belongs to another store")
        return True

    def _ignore(self, path: Path, why: str) -> None:
        self._unusable.add(path)
        self._warn(f"{why}; nothing of it is used.")

    def _write(self, data: bytes, sync: bool = False) -> Path:
        path = new_path(self.folder)
        with atomic(path, "wb", sync) as handle:
            handle.write(data)
        self._open(path)
        self._bytes += len(data)
        return path

    def _merge(self) -> None:
        """Make one shard of the small ones that this process has written."""
        small, self._small, self._small_bytes = [p for p in self._small if p in self._shards], [], 0
        if len(small) < 2:
            return
        keys = [key for path in small for key in self._shards[path].records()]
        records = {key: record for key in keys if (record := self.get(key)) is not None}
        try:
            self._write(serialised(self._manifest, records), sync=True)
        except EnvironmentFault as error:
            self._warn(f"{error} Small shards were not merged; they are read as they are.")
            return
        for path in small:
            path.unlink(missing_ok=True)
        self.refresh()

    def _holder(self, key: str) -> Shard | None:
        """A shard that has the record of this key."""
        for shard in self._recent:
            if key in shard:
                return shard
        hashed = key_hash(key)
        at = int(np.searchsorted(self._hashes, hashed))
        while at < len(self._hashes) and self._hashes[at] == hashed:
            shard = self._indexed[self._holders[at]]
            if key in shard:
                return shard
            at += 1
        return None

    def _index(self) -> None:
        """Note of all records which shard has them, in 12 bytes each."""
        self._indexed, self._recent = list(self._shards.values()), []
        hashes = [shard.hashes for shard in self._indexed]
        holders = [np.full(len(one), place, dtype=np.uint32) for place, one in enumerate(hashes)]
        joined = np.concatenate([np.empty(0, dtype=np.uint64), *hashes])
        order = np.argsort(joined, kind="stable")
        self._hashes = joined[order]
        self._holders = np.concatenate([np.empty(0, dtype=np.uint32), *holders])[order]

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)
