"""One file of a store: an append-only row of checksummed records.

The format, version 1; all numbers little-endian:

    header   8 bytes "STILLSH1", u32 length of the facts, u32 CRC-32 of the facts, the facts as JSON (UTF-8),
             zeros up to a multiple of 8. The facts are those of the store, and "shard", a random name that
             binds an index to its shard.
    record   4 bytes "REC1", u32 rows, u64 size of the payload, 16 bytes key, u32 CRC-32 of the payload,
             u32 CRC-32 of the 36 bytes before, then the payload and zeros up to a multiple of 8.

A record is whole or it is not there: one that ends beyond the file is a torn tail, which readers do not
see. The next writer cuts it: the first 40 bytes of the tail become a header "CUT1" whose size reaches to the
end of the file, and records go on behind it. (A file that got shorter would kill whoever has it mapped.)
Nothing else is ever written over. A record whose own header is damaged is passed over by looking for the next
header that is whole; one whose payload is damaged is found when it is read.

    index    `NNNNN.index` beside `NNNNN.shard`: 8 bytes "STILLIX2", the shard's name (16 bytes), u64 bytes of
             the shard that it covers, u32 number of entries, u32 CRC-32 of all else, then for each entry
             key (16 bytes), offset of the payload (u64), size (u64), rows (u32). It saves reading the shard's
             headers; without it, or with a wrong one, they are read.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stillhouse.files import atomic

MAGIC, INDEX_MAGIC, MARKER, CUT = b"STILLSH1", b"STILLIX2", b"REC1", b"CUT1"
HEADER, RECORD, INDEX = struct.Struct("<8sII"), struct.Struct("<4sIQ16sII"), struct.Struct("<8s16sQII")
ENTRY = np.dtype([("key", "V16"), ("offset", "<u8"), ("size", "<u8"), ("rows", "<u4")])
KEY_BYTES = 16


class Place(NamedTuple):
    """Where a record's payload is."""

    shard: int
    offset: int
    size: int
    rows: int


class Found(NamedTuple):
    """What reading the headers of a shard gave."""

    entries: list[tuple[bytes, int, int, int]]
    """Key, offset of the payload, size, rows."""
    end: int
    """Where the last whole record ends; the file is longer if its tail is torn."""
    damaged: list[tuple[int, int]]
    """Stretches between whole records that hold no readable header."""


class NotAShard(ValueError):
    """The file does not begin as a shard does."""


def padded(size: int) -> int:
    """The next multiple of 8."""
    return -(-size // 8) * 8


def header_bytes(facts: Mapping[str, Any]) -> bytes:
    """The beginning of a new shard, with a name of its own."""
    text = json.dumps({**facts, "shard": uuid.uuid4().hex}, sort_keys=True).encode()
    whole = HEADER.pack(MAGIC, len(text), zlib.crc32(text)) + text
    return whole.ljust(padded(len(whole)), b"\0")


def read_header(data: bytes | mmap.mmap) -> tuple[dict[str, Any], int]:
    """The facts of a shard, and where its records begin.

    Raises:
        NotAShard: it is too short, or its beginning is damaged.
    """
    if len(data) < HEADER.size:
        raise NotAShard("it is shorter than a header")
    magic, length, checksum = HEADER.unpack(data[: HEADER.size])
    text = data[HEADER.size : HEADER.size + length]
    if magic != MAGIC or len(text) < length or zlib.crc32(text) != checksum:
        raise NotAShard("its header is damaged")
    facts: dict[str, Any] = json.loads(text)
    return facts, padded(HEADER.size + length)


def record_bytes(key: bytes, rows: int, payload: bytes) -> bytes:
    """A whole record."""
    head = RECORD.pack(MARKER, rows, len(payload), key, zlib.crc32(payload), 0)[:-4]
    gap = padded(len(payload)) - len(payload)
    return b"".join((head, struct.pack("<I", zlib.crc32(head)), payload, bytes(gap)))


def cut_bytes(tail: int) -> tuple[bytes, int]:
    """The header that takes a torn tail of so many bytes out, and how far the tail then reaches."""
    reach = padded(max(tail, RECORD.size))
    head = RECORD.pack(CUT, 0, reach - RECORD.size, bytes(KEY_BYTES), 0, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head)), reach


def scan(data: mmap.mmap, start: int) -> Found:
    """Read the headers of all records from `start` on."""
    entries, damaged, at, size = [], [], start, len(data)
    while at + RECORD.size <= size:
        head = _head(data, at)
        if head is not None and at + RECORD.size + padded(head[1]) > size:
            break
        if head is None:
            following = _next_head(data, at + 8)
            if following is None:
                break
            damaged.append((at, following))
            at = following
            continue
        rows, length, key = head
        if data[at : at + 4] == MARKER:
            entries.append((key, at + RECORD.size, length, rows))
        at += RECORD.size + padded(length)
    return Found(entries, at, damaged)


def payload(data: mmap.mmap, key: bytes, place: Place) -> memoryview | None:
    """The payload of a record, without a copy; None if it is not, bit for bit, what was written."""
    start = place.offset - RECORD.size
    head = _head(data, start)
    if head is None or head != (place.rows, place.size, key):
        return None
    found = memoryview(data)[place.offset : place.offset + place.size]
    (checksum,) = struct.unpack_from("<I", data, start + 32)
    return found if zlib.crc32(found) == checksum else None


def mapped(path: Path) -> mmap.mmap:
    """The whole file, to read.

    Raises:
        NotAShard: it is empty.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as handle:
        if os.fstat(handle.fileno()).st_size == 0:
            raise NotAShard("it is empty")
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def write_index(path: Path, name: str, covered: int, entries: Sequence[tuple[bytes, int, int, int]]) -> None:
    """Write the index of a shard, atomically."""
    table = np.array([(np.void(key), *rest) for key, *rest in entries], dtype=ENTRY)
    raw = table.tobytes()
    with atomic(path, "wb") as handle:
        head = INDEX.pack(INDEX_MAGIC, bytes.fromhex(name), covered, len(table), 0)[:-4]
        handle.write(head + struct.pack("<I", zlib.crc32(raw, zlib.crc32(head))) + raw)


def read_index(path: Path, name: str, size: int) -> Found | None:
    """The index of a shard of `size` bytes; None if there is none, or it is damaged or another shard's."""
    with contextlib.suppress(OSError):
        raw = path.read_bytes()
        if len(raw) < INDEX.size:
            return None
        magic, owner, covered, count, checksum = INDEX.unpack(raw[: INDEX.size])
        body = raw[INDEX.size :]
        if magic != INDEX_MAGIC or owner != bytes.fromhex(name) or covered > size:
            return None
        if (
            len(body) != count * ENTRY.itemsize
            or zlib.crc32(body, zlib.crc32(raw[: INDEX.size - 4])) != checksum
        ):
            return None
        return Found(list(_entries(np.frombuffer(body, ENTRY))), covered, [])
    return None


def _entries(table: Any) -> Iterator[tuple[bytes, int, int, int]]:
    columns = (table["offset"].tolist(), table["size"].tolist(), table["rows"].tolist())
    raw = table["key"].tobytes()
    for number, (offset, size, rows) in enumerate(zip(*columns, strict=True)):
        yield raw[number * KEY_BYTES : (number + 1) * KEY_BYTES], offset, size, rows


def _head(data: mmap.mmap, at: int) -> tuple[int, int, bytes] | None:
    """Rows, size and key of the record at a place; None if no whole header is there."""
    if at < 0 or at + RECORD.size > len(data):
        return None
    raw = data[at : at + RECORD.size]
    marker, rows, size, key, _, checksum = RECORD.unpack(raw)
    if marker not in (MARKER, CUT) or zlib.crc32(raw[:-4]) != checksum:
        return None
    return rows, size, key


def _next_head(data: mmap.mmap, start: int) -> int | None:
    found = [at for marker in (MARKER, CUT) if (at := _first_head(data, marker, start)) is not None]
    return min(found, default=None)


def _first_head(data: mmap.mmap, marker: bytes, start: int) -> int | None:
    at = data.find(marker, start)
    while at >= 0:
        if at % 8 == 0 and _head(data, at) is not None:
            return at
        at = data.find(marker, at + 1)
    return None
