"""Records of a batch's sequences from a store, found by content; what is missing is computed and stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from stillhouse.core.batch import TokenBatch
from stillhouse.errors import TeacherError
from stillhouse.teachers.base import (
    MetricSums,
)
from stillhouse.teachers.store import (
    Record,
    Store,
)

Compute = Callable[[TokenBatch, Sequence[str]], list[Record]]
"""Sequences of a batch and their keys -> the record of each, from the teacher itself."""


def content_keys(batch: TokenBatch, in_process: bool = True) -> list[str]:
    """For each sequence of a batch 32 hexadecimal digits that change with its token ids and the pixels of its
    images, with where the response begins and which of its tokens have rows and, for a teacher in this
    process, with the dtype of autocast, but not with padding, order or step."""
    device = batch.input_ids.device.type
    autocast = in_process and torch.is_autocast_enabled(device)
    dtype = str(torch.get_autocast_dtype(device)) if autocast else ""
    keys = []
    shown = batch.images or ((),) * len(batch)
    sequences = zip(batch.token_ids, batch.prompt_lengths, batch.trained, shown, strict=True)
    for ids, start, kept, images in sequences:
        content = f"{start} {dtype}\n".encode() + np.array(ids, dtype="<i8").tobytes()
        if kept is not None:
            content += bytes(kept)
        content += b"".join(bytes.fromhex(image.digest) for image in images)
        keys.append(hashlib.blake2b(content, digest_size=16).hexdigest())
    return keys


class ReadThroughCache:
    """The records of a batch's sequences: read from a store, or on a miss computed and stored."""

    def __init__(self, store: Store, compute: Compute | None, in_process: bool = True) -> None:
        """A cache over a store.

        Args:
            store: where records are.
            compute: makes those that are missing; None where the teacher is not available.
            in_process: whether the teacher computes in this process; see `TeacherConfig`.
        """
        self.store = store
        self._compute = compute
        self._in_process = in_process
        self._lookups = self._hits = 0
        self._reported = (0, 0)
        self._prefetched: dict[str, Record] = {}

    def prefetch(self, batch: TokenBatch) -> None:
        """Have the records of these sequences in memory, and no others, even where the store has no room."""
        self._prefetched = {}
        records = self.records(batch)
        self._prefetched = dict(zip(content_keys(batch, self._in_process), records, strict=True))

    def records(self, batch: TokenBatch) -> list[Record]:
        """One for each sequence of the batch.

        Raises:
            TeacherError: some are missing, and there is no teacher to compute them.
        """
        keys = content_keys(batch, self._in_process)
        if all(key in self._prefetched for key in keys):
            return [self._prefetched[key] for key in keys]
        found = [self.store.get(key) for key in keys]
        if None in found:
            self.store.refresh()  # another process may have written them
            found = [one or self.store.get(key) for key, one in zip(keys, found, strict=True)]
        missing = [row for row, one in enumerate(found) if one is None]
        self._lookups += len(keys)
        self._hits += len(keys) - len(missing)
        if missing:
            computed = self._fill(batch, missing, [keys[row] for row in missing])
            for row, record in zip(missing, computed, strict=True):
                found[row] = record
        return [one for one in found if one is not None]

    def knows(self, batch: TokenBatch) -> list[bool]:
        """For each sequence whether its record is there."""
        return [key in self.store for key in content_keys(batch, self._in_process)]

    def _fill(self, batch: TokenBatch, rows: list[int], keys: list[str]) -> list[Record]:
        if self._compute is None:
            raise TeacherError(
                f"{self.store.folder}: {len(rows)} of the {len(batch)} sequences of a batch are "
                f"not in the teacher cache, which holds {len(self.store):,}, and its on_miss is error. "
                "Build the cache for this run where the teacher is (stillhouse cache build), with the same "
                "data, template and limits; set its on_miss: fill, where the teacher is available; or "
                "on_miss: skip, which leaves out rows of the data set that are not there."
            )
        part = batch.select(rows)
        computed = self._compute(part, keys)
        self.store.put(dict(zip(keys, computed, strict=True)))
        return computed

    def pop_metrics(self) -> MetricSums:
        """The share of hits since this was last called, and the size of the store."""
        lookups, hits = self._lookups - self._reported[0], self._hits - self._reported[1]
        self._reported = (self._lookups, self._hits)
        if not lookups:
            return {}
        return {"cache/hits": (hits, lookups), "cache/megabytes": (self.store.size / 1e6, 1)}

    def close(self) -> str | None:
        """Let go of the files; a line on what the cache was good for."""
        self.store.close()
        if not self._lookups:
            return None
        line = (
            f"Teacher cache: {self._hits / self._lookups:.1%} of {self._lookups:,} sequences were there; "
            f"{self.store.size / 1e6:,.1f} MB in {self.store.folder}"
        )
        if self.store.refused:
            line += f"; {self.store.refused:,} were not stored (teacher.limit)"
        return f"{line}; {self.store.damaged:,} damaged" if self.store.damaged else line
