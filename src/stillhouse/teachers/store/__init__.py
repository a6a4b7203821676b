"""Where what a teacher said is kept on disk: by content, append-only, checksummed."""

from stillhouse.teachers.store.store import SHARD_BYTES, Store

__all__ = ["SHARD_BYTES", "Store"]
