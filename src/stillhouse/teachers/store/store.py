"""A folder of shards that many processes read and each process appends to in a shard of its own."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stillhouse.errors import TeacherError
from stillhouse.files import told
from stillhouse.teachers.store import shard as shards
from stillhouse.teachers.store.shard import NotAShard, Place

SHARD_BYTES = 512 * 2**20

logger = logging.getLogger("stillhouse")


class Store:
    """Payloads by key: 16 bytes that are a hash of the content which the payload is about.

    Reading needs no lock: a record is visible once it is whole, and every payload is checked against its
    checksum when it is read. A damaged one is named in a warning and from then on missing. Writing goes to
    one shard of the folder that this process alone holds (a lock on the file, gone with the process).

    Example:
        >>> with Store(folder, {"form": "hidden"}) as store:
        ...     store.put([(key, rows, payload)])
        ...     store.get(key)
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], limit: int | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Open a store; nothing is written before the first `put`.

        Args:
            folder: where the shards are; need not be there yet.
            facts: what all of its records have in common; shards with other facts are not used.
            limit: bytes of all shards together beyond which nothing is added any more.
            shard_bytes: a shard of this size takes no more records.
        """
        self.folder = folder
        self.damaged = 0
        """Records and stretches that were found damaged."""
        self._refused: set[bytes] = set()
        self._facts = dict(facts)
        self._limit = limit
        self._shard_bytes = shard_bytes
        self._places: dict[bytes, Place] = {}
        self._copies: dict[bytes, list[Place]] = {}
        self._readers: dict[int, _Reader] = {}
        self._writer: _Writer | None = None
        self._bytes = 0
        self._used: set[int] = set()
        self._told: set[str] = set()
        self.refresh()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @property
    def size(self) -> int:
        """Bytes of all shards, as last seen."""
        return self._bytes

    @property
    def refused(self) -> int:
        """Records that were not kept because of `limit`."""
        return len(self._refused)

    def places(self) -> Mapping[bytes, Place]:
        """Where everything is."""
        return self._places

    def get(self, key: bytes) -> memoryview | None:
        """The payload of a key, without a copy; None if it is not there or is damaged."""
        place = self._places.get(key)
        if place is None:
            return None
        reader = self._readers[place.shard]
        if place.offset + place.size > len(reader.data):
            self._read(place.shard)  # the shard has grown since it was mapped
            place = self._places.get(key)
            if place is None:
                return None
            reader = self._readers[place.shard]
        found = shards.payload(reader.data, key, place)
        if found is None:
            self._drop(key, place)
            return self.get(key)
        self._used.add(place.shard)
        return found

    def _drop(self, key: bytes, place: Place) -> None:
        """Forget a damaged record; another copy of it takes its place."""
        self.damaged += 1
        self._tell(
            f"{self._path(place.shard)}: the record at byte {place.offset} is damaged and not used; what it "
            "held is computed anew where the teacher is at hand. `stillhouse cache verify --repair` removes "
            "it."
        )
        del self._places[key]
        if copies := self._copies.get(key):
            self._places[key] = copies.pop()

    def put(self, records: Iterable[tuple[bytes, int, bytes]]) -> int:
        """Append records of (key, rows, payload) in one write; how many were kept.

        A key that is there already is left as it is. Beyond the size limit nothing is kept.

        Raises:
            EnvironmentFault: the disk is full or the folder cannot be written.
        """
        new = {key: (rows, payload) for key, rows, payload in records if key not in self._places}
        if not new:
            return 0
        whole = [shards.record_bytes(key, rows, payload) for key, (rows, payload) in new.items()]
        size = sum(map(len, whole))
        if self._limit is not None and self._bytes + size > self._limit:
            self._refused |= new.keys()
            self._tell(
                f"{self.folder}: holds {self._bytes / 1e6:,.1f} MB and may not grow beyond "
                f"{self._limit / 1e6:,.1f} MB; what is new is computed but not kept. Raise teacher.limit, or "
                "make room with `stillhouse cache prune`."
            )
            return 0
        writer = self._open_writer()
        start = writer.append(b"".join(whole))
        self._bytes += size
        for (key, (rows, payload)), record in zip(new.items(), whole, strict=True):
            place = Place(writer.number, start + shards.RECORD.size, len(payload), rows)
            self._places[key] = place
            writer.entries.append((key, place.offset, place.size, rows))
            start += len(record)
        return len(new)

    def refresh(self) -> None:
        """See what other processes have written meanwhile."""
        total = 0
        for path in sorted(self.folder.glob("*.shard")):
            number = int(path.stem) if path.stem.isdigit() else -1
            with contextlib.suppress(OSError):
                facts = path.stat()
                total += facts.st_size
                reader = self._readers.get(number)
                grown = reader is None or facts.st_size > reader.seen or facts.st_ino != reader.inode
                if number >= 0 and grown:
                    self._read(number)
        self._bytes = total

    def close(self) -> None:
        """Write the index of the own shard, note which shards were used, and let go of everything."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for number in self._used:
            with contextlib.suppress(OSError):
                self._path(number).with_suffix(".used").touch()
        self._used.clear()
        self._readers.clear()  # payloads that are still looked at keep their map

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.shard"

    def _read(self, number: int) -> None:
        """Map a shard and note the records that are new in it."""
        path, before = self._path(number), self._readers.get(number)
        try:
            inode = path.stat().st_ino
            data = shards.mapped(path)
            facts, start = shards.read_header(data)
        except OSError:
            return  # gone, or not ours to read
        except NotAShard as error:
            if _size_of(path) >= shards.HEADER.size:  # a shorter one is just being made
                self.damaged += 1
                self._tell(f"{path}: {error}; nothing of it is used.")
            return
        name = facts.pop("shard")
        if facts != self._facts:
            self._tell(f"{path}: belongs to another store; nothing of it is used.")
            return
        if before is not None and before.name == name:
            start, found = before.end, shards.Found([], before.end, [])
        else:
            self._forget(number)
            indexed = shards.read_index(path.with_suffix(".index"), name, len(data))
            found = indexed or shards.Found([], start, [])
        fresh = shards.scan(data, found.end)
        for key, *rest in (*found.entries, *fresh.entries):
            place = Place(number, *rest)
            known = self._places.get(key)
            if known is not None and known != place:
                self._copies.setdefault(key, []).append(known)
            self._places[key] = place
        for begin, end in fresh.damaged:
            self.damaged += 1
            self._tell(f"{path}: bytes {begin} to {end} are damaged; what they held is not used.")
        self._readers[number] = _Reader(path, data, name, fresh.end, len(data), inode)

    def _forget(self, number: int) -> None:
        """Forget all records of a shard."""
        self._places = {key: place for key, place in self._places.items() if place.shard != number}
        for key, copies in self._copies.items():
            self._copies[key] = [place for place in copies if place.shard != number]

    def _open_writer(self) -> _Writer:
        if self._writer is not None and self._writer.end >= self._shard_bytes:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            with told(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._writer = self._claim()
            self._read(self._writer.number)
            self._writer.name = self._readers[self._writer.number].name
            self._writer.entries = [
                (key, place.offset, place.size, place.rows)
                for key, place in self._places.items()
                if place.shard == self._writer.number
            ]
        return self._writer

    def _claim(self) -> _Writer:
        """A shard that is not full and that nobody else writes to; a new one if there is none."""
        numbers = sorted(int(p.stem) for p in self.folder.glob("*.shard") if p.stem.isdigit())
        number = -1
        for number in numbers:
            writer = _Writer.claimed(self._path(number), number, self._facts, self._shard_bytes)
            if writer is not None:
                return writer
        while True:
            number += 1
            writer = _Writer.claimed(self._path(number), number, self._facts, self._shard_bytes)
            if writer is not None:
                return writer
            if number > 10**5:
                raise TeacherError(f"{self.folder}: no shard could be opened for writing.")

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)


class _Reader:
    """A shard as it was when it was last mapped."""

    __slots__ = ("data", "end", "inode", "name", "path", "seen")

    def __init__(self, path: Path, data: mmap.mmap, name: str, end: int, seen: int, inode: int) -> None:
        self.path, self.data, self.name, self.end, self.seen, self.inode = path, data, name, end, seen, inode


class _Writer:
    """A shard that this process holds the lock of."""

    def __init__(self, path: Path, number: int, handle: int, end: int) -> None:
        self.path, self.number, self.end = path, number, end
        self.name = ""
        self.entries: list[tuple[bytes, int, int, int]] = []
        self._handle = handle

    @classmethod
    def claimed(cls, path: Path, number: int, facts: Mapping[str, Any], full: int) -> _Writer | None:
        """The shard, locked, with its torn tail cut; None if it is another's, full, or damaged at its
        beginning."""
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except PermissionError:
            if path.exists():  # another user's, to read only
                return None
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_ino != path.stat().st_ino:
                raise BlockingIOError("replaced while we came")
            return cls(path, number, handle, _sound_end(path, handle, facts, full))
        except (BlockingIOError, FileNotFoundError, NotAShard):
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise

    def append(self, data: bytes) -> int:
        """Write at the end; where it begins."""
        start, done, view = self.end, 0, memoryview(data)
        with told(self.path):
            while done < len(view):
                done += os.pwrite(self._handle, view[done:], start + done)
        self.end += len(data)
        return start

    def close(self) -> None:
        """Write the index and unlock."""
        with contextlib.suppress(OSError):
            os.fsync(self._handle)
            shards.write_index(self.path.with_suffix(".index"), self.name, self.end, self.entries)
        os.close(self._handle)


def _size_of(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _sound_end(path: Path, handle: int, facts: Mapping[str, Any], full: int) -> int:
    """Where to append to a locked shard: writes the header of an empty one, cuts a torn tail.

    Raises:
        NotAShard: it cannot be appended to.
    """
    size = os.fstat(handle).st_size
    if size == 0:
        head = shards.header_bytes(facts)
        os.pwrite(handle, head, 0)
        return len(head)
    data = shards.mapped(path)
    theirs, start = shards.read_header(data)
    name = theirs.pop("shard")
    if theirs != dict(facts):
        raise NotAShard("it belongs to another store")
    if size >= full:
        raise NotAShard("it is full")
    indexed = shards.read_index(path.with_suffix(".index"), name, size)
    end = shards.scan(data, indexed.end if indexed else start).end
    if end == size:
        return end
    head, reach = shards.cut_bytes(size - end)
    os.pwrite(handle, head, end)
    os.ftruncate(handle, end + reach)  # at most a few bytes longer
    logger.warning(
        "%s: the last %s bytes are no whole record, as a process that was killed leaves them; they were cut.",
        path,
        size - end,
    )
    return end + reach
