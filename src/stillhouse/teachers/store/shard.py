"""One file of a teacher store: records of named tensors, each with a checksum, in the safetensors format.

A shard is written whole under a name of its own and never changed. So a kill leaves no torn file, readers
need no lock, and what another process writes is either there or not. In the file the tensor `KEY/NAME`
belongs to the record KEY. The metadata "index" is JSON: "manifest" says which store the shard belongs to,
"tensors" lists the names that every record has, and "records" holds for each key the number of rows and a
CRC-32 of key, names, dtypes, shapes and bytes. "checksum" is the CRC-32 of the index itself.
"""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stillhouse.files import atomic

PATTERN = "shard-*.safetensors"
HEAD = "head.safetensors"
"""The file beside the shards that holds the teacher's head as its one record."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What every shard of a store says about it. `codec` and `fingerprint` tell stores apart."""

    codec: str
    """Name of the codec, on which the tensors of a record depend."""
    fingerprint: str
    """Of the teacher."""
    teacher: Mapping[str, Any] = field(default_factory=dict)
    """Kind, path, adapter and URL of the teacher when the shard was written; None where it has none."""
    tokenizer: str | None = None
    """Digest of the vocabulary."""
    head: Mapping[str, Any] = field(default_factory=dict)
    """Scale and soft cap of the head, where the store has one."""

    def same_store(self, other: Manifest) -> bool:
        """Whether records of both may be used together."""
        return (self.codec, self.fingerprint) == (other.codec, other.fingerprint)


@dataclass(frozen=True, slots=True)
class Record:
    """What a store holds for one key."""

    rows: int
    """Response tokens that it is about."""
    tensors: Mapping[str, Tensor]

    def checksum(self, key: str) -> int:
        """CRC-32 of everything that is read back under this key."""
        crc = zlib.crc32(f"{key} {self.rows}".encode())
        for name, tensor in sorted(self.tensors.items()):
            crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
            crc = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, crc)
        return crc


class DamagedShard(ValueError):
    """The header of a shard cannot be read."""


class Shard:
    """A shard that is mapped into memory, to read."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            DamagedShard: it is not as it was written, or of another version.
            OSError: the file is gone or cannot be opened.
        """
        self.path = path
        self.size = path.stat().st_size
        try:
            self._file = safe_open(path, "pt")
            metadata = self._file.metadata()
            index = json.loads(metadata["index"])
            sound = zlib.crc32(metadata["index"].encode()) == int(metadata["checksum"])
            self.manifest = Manifest(**index["manifest"])
            self._names: list[str] = index["tensors"]
            self.records: dict[str, tuple[int, int]] = index["records"]
            """Rows and checksum of each record, by key."""
        except (SafetensorError, ValueError, TypeError, KeyError):
            sound = False
        except RuntimeError as error:  # safe_open opens the file twice, and it went in between
            raise FileNotFoundError(path) from error
        if not sound:
            raise DamagedShard(f"{path}: its header is damaged or of another version")

    def read(self, key: str) -> Record | None:
        """The record of a key, without a copy; None if it is not, bit for bit, what was written."""
        rows, checksum = self.records[key]
        try:
            record = Record(rows, {name: self._file.get_tensor(f"{key}/{name}") for name in self._names})
        except SafetensorError:  # a name in the header is not as it was written
            return None
        return record if record.checksum(key) == checksum else None


def serialised(manifest: Manifest, records: Mapping[str, Record]) -> bytes:
    """The content of a shard with these records, by key."""
    index = json.dumps(
        {
            "manifest": asdict(manifest),
            "tensors": sorted({name for record in records.values() for name in record.tensors}),
            "records": {key: (record.rows, record.checksum(key)) for key, record in records.items()},
        },
        default=str,
    )
    return save(
        {f"{key}/{name}": one for key, record in records.items() for name, one in record.tensors.items()},
        {"index": index, "checksum": str(zlib.crc32(index.encode()))},
    )


def write_shard(path: Path, manifest: Manifest, records: Mapping[str, Record]) -> None:
    """Write records as one file, atomically.

    Raises:
        EnvironmentFault: the disk is full or the folder cannot be written.
    """
    with atomic(path, "wb") as handle:
        handle.write(serialised(manifest, records))


def new_path(folder: Path) -> Path:
    """A name that no other process takes."""
    return folder / f"shard-{uuid.uuid4().hex}.safetensors"
