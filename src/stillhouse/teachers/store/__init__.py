"""A teacher's signal on disk: records by content, each with a checksum, in safetensors files."""

from stillhouse.teachers.store.maintenance import find_stores
from stillhouse.teachers.store.shard import HEAD, DamagedShard, Manifest, Record, Shard, write_shard
from stillhouse.teachers.store.store import Store

__all__ = ["HEAD", "DamagedShard", "Manifest", "Record", "Shard", "Store", "find_stores", "write_shard"]
