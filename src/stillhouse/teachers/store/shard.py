"""One file of a teacher store: records of named tensors, each with a checksum, in the safetensors format.

A shard is written whole under a name of its own and never changed. So a kill leaves no torn file, readers
need no lock, and what another process writes is either there or not. In the file the tensor `KEY/NAME`
belongs to the record KEY. The metadata "index" is JSON: "manifest" says which store the shard belongs to,
"tensors" lists the names that every record has, and "records" holds for each key the number of rows and a
CRC-32 of key, names, dtypes, shapes and bytes. "checksum" is the CRC-32 of the index itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from stillhouse.files import atomic

PATTERN = "shard-*.safetensors"
HEAD = "head.safetensors"
"""The file beside the shards that holds the teacher's head as its one record."""
_LENGTH = struct.Struct("<Q")
"""A file begins with the length of its header."""
_METADATA = b'{"__metadata__":'
_DESCRIBED = re.compile(rb'"([^"\\]+/[^"/\\]+)":\{')
"""A tensor's name in a header, up to its description."""
_DESCRIPTION = 256
"""More bytes than describe a tensor."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


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
    """A shard that is mapped into memory, to read.

    In memory it has, for each record, 16 bytes and 4 for each of its tensors: a hash of the key, sorted, the
    number of rows, the checksum, and where in the header the tensor is described. The rest stays in the file.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            DamagedShard: it is not as it was written, or of another version.
            OSError: the file is gone or cannot be opened.
        """
        self.path = path
        self.size = path.stat().st_size
        try:
            mapped: Any = torch.UntypedStorage.from_file(str(path), False, self.size)
            self._bytes = torch.empty(0, dtype=torch.uint8).set_(mapped)
            self._begin = _LENGTH.size + _LENGTH.unpack(self._read(0, _LENGTH.size))[0]
            header = self._read(_LENGTH.size, self._begin)
            sound = self._take(header)
        except (struct.error, ValueError, TypeError, KeyError, OverflowError):
            sound = False
        except RuntimeError as error:
            if not path.exists():
                raise FileNotFoundError(path) from error
            sound = False  # it is empty
        if not sound:
            raise DamagedShard(f"{path}: its header is damaged or of another version")

    def __contains__(self, key: str) -> bool:
        return self._row(key) >= 0

    def records(self) -> dict[str, tuple[int, int]]:
        """Rows and checksum of each record, by key; read from the file."""
        found = json.loads(_metadata(self._read(_LENGTH.size, self._begin))["index"])["records"]
        return {key: (rows, checksum) for key, (rows, checksum) in found.items() if key in self}

    def forget(self, key: str) -> None:
        """Do without a record from now on."""
        self._forgotten.add(key)

    def read(self, key: str) -> Record | None:
        """The record of a key, without a copy; None if it is not, bit for bit, what was written."""
        row = self._row(key)
        try:
            places = zip(self._names, self._places[row].tolist(), strict=True)
            record = Record(int(self._rows[row]), {name: self._tensor(key, name, at) for name, at in places})
        except (ValueError, TypeError, KeyError, RuntimeError):  # the header is not as it was written
            return None
        return record if record.checksum(key) == int(self._checksums[row]) else None

    def _take(self, header: bytes) -> bool:
        """Index the records of a header; whether it is sound and the file has all that it describes."""
        metadata = _metadata(header)
        index = json.loads(metadata["index"])
        self.manifest = Manifest(**index["manifest"])
        self._names: list[str] = index["tensors"]
        records = index["records"]
        self._forgotten: set[str] = set()
        hashes = np.array([key_hash(key) for key in records], dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[order]
        """Of the keys, sorted."""
        facts = np.array(list(records.values()), dtype=np.uint32).reshape(len(records), 2)[order]
        self._rows, self._checksums = facts[:, 0].copy(), facts[:, 1].copy()
        places = {found[1]: _LENGTH.size + found.end() - 1 for found in _DESCRIBED.finditer(header)}
        wanted = [[places.get(f"{key}/{name}".encode(), 0) for name in self._names] for key in records]
        self._places = np.array(wanted, dtype=np.uint32).reshape(len(records), len(self._names))[order]
        last = max(places.values(), default=0)
        end = self._described(last)["data_offsets"][1] if last else 0
        whole = bool(self._begin + end == self.size)
        return whole and zlib.crc32(metadata["index"].encode()) == int(metadata["checksum"])

    def _row(self, key: str) -> int:
        """Where a key is in the index; -1 if it is not."""
        if key in self._forgotten:
            return -1
        hashed = key_hash(key)
        at = int(np.searchsorted(self.hashes, hashed))
        return at if at < len(self.hashes) and self.hashes[at] == hashed else -1

    def _read(self, begin: int, end: int) -> bytes:
        return bytes(self._bytes[begin:end].numpy())

    def _described(self, place: int) -> dict[str, Any]:
        """Dtype, shape and offsets of the tensor that is described at this place of the header."""
        text = self._read(place, place + _DESCRIPTION)
        found: dict[str, Any] = json.loads(text[: text.index(b"}") + 1])
        return found

    def _tensor(self, key: str, name: str, place: int) -> Tensor:
        """A tensor, described at this place of the header; its name stands before."""
        told = f'"{key}/{name}":'.encode()
        if self._read(place - len(told), place) != told:
            raise KeyError(name)
        found = self._described(place)
        begin, end = (self._begin + int(one) for one in found["data_offsets"])
        return self._bytes[begin:end].view(_DTYPES[found["dtype"]]).reshape(found["shape"])


def _metadata(header: bytes) -> dict[str, str]:
    """What stands first in a header, before what may be megabytes about tensors."""
    if not header.startswith(_METADATA):
        raise ValueError("no metadata")
    text = header.decode()
    found: dict[str, str] = json.JSONDecoder().raw_decode(text, len(_METADATA))[0]
    return found


def key_hash(key: str) -> np.uint64:
    """64 bits that stand for a key."""
    return np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))


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
