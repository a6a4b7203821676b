"""Looking after a cache folder: what is in it, whether it is sound, and making room."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.errors import TeacherError
from stillhouse.files import told, write_json
from stillhouse.teachers.store import shard as shards
from stillhouse.teachers.store.shard import Found, NotAShard, Place

FACTS, HEAD = "store.json", "head.safetensors"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in one store of a folder."""

    place: Path
    form: str
    teacher: str
    """Its fingerprint."""
    path: str | None
    """Where the teacher was when the store was made."""
    records: int
    tokens: int
    bytes: int
    shards: int
    last_used: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch of a shard that is not what was written."""

    path: Path
    offset: int
    what: str
    mends_itself: bool = False
    """True for a torn tail, which the next writer cuts."""


def write_facts(place: Path, facts: Mapping[str, Any]) -> None:
    """Write down what a store is, with a checksum.

    Args:
        place: the store's folder.
        facts: "shards", the facts of its shards; "teacher", who it was; "head_digest", where it has a head.
    """
    whole = {"format": FORMAT, **facts}
    write_json(place / FACTS, {**whole, "checksum": _checksum(whole)})


def read_facts(place: Path) -> dict[str, Any]:
    """What a store is.

    Raises:
        TeacherError: the file is damaged, or of another version.
    """
    try:
        found: dict[str, Any] = json.loads((place / FACTS).read_text(encoding="utf-8"))
        sound = found.pop("checksum") == _checksum(found) and found["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise TeacherError(
            f"{place / FACTS}: is damaged or of another version. `stillhouse cache build` with the teacher "
            f"at hand writes it anew and leaves the shards beside it alone; without a teacher delete {place}."
        )
    return found


def read_head(place: Path, facts: Mapping[str, Any]) -> bytes:
    """The file of the teacher's head.

    Raises:
        TeacherError: it is not, bit for bit, what was written.
    """
    data = (place / HEAD).read_bytes() if (place / HEAD).is_file() else b""
    if digest_of(data) != facts["head_digest"]:
        raise TeacherError(
            f"{place / HEAD}: is damaged or missing. Take it out with `stillhouse cache verify --repair`; "
            "`stillhouse cache build` with the teacher at hand then writes it anew, and the shards stay."
        )
    return data


def digest_of(data: bytes) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _checksum(facts: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(facts, sort_keys=True).encode())


def contents(folder: Path) -> list[Contents]:
    """All stores of a cache folder, the most recently used first."""
    found = [_contents(path.parent) for path in folder.glob(f"*/{FACTS}")]
    return sorted(found, key=lambda one: -one.last_used)


def verify(folder: Path) -> Iterator[tuple[Path, int, list[Damage]]]:
    """Read every byte: for each file of a store the number of sound records, and what is damaged."""
    for place in sorted(path.parent for path in folder.glob(f"*/{FACTS}")):
        yield from _verified(place)
    for path in sorted(folder.glob("*/*.shard")):
        try:
            data = shards.mapped(path)
            _, start = shards.read_header(data)
        except (OSError, NotAShard) as error:
            yield path, 0, [Damage(path, 0, str(error))]
            continue
        found = shards.scan(data, start)
        damage = [Damage(path, begin, f"bytes {begin} to {end}") for begin, end in found.damaged]
        sound = 0
        for entry in found.entries:
            if _payload(data, entry) is None:
                damage.append(Damage(path, entry[1], f"the record at byte {entry[1]}"))
            else:
                sound += 1
        if found.end < len(data):
            what = f"the last {len(data) - found.end} bytes, no whole record"
            damage.append(Damage(path, found.end, what, mends_itself=True))
        yield path, sound, damage


def _verified(place: Path) -> Iterator[tuple[Path, int, list[Damage]]]:
    """What is damaged beside the shards of a store."""
    try:
        facts = read_facts(place)
    except TeacherError:
        yield place / FACTS, 0, [Damage(place / FACTS, 0, "what the store is")]
        return
    try:
        if facts.get("head_digest"):
            read_head(place, facts)
    except TeacherError:
        yield place / HEAD, 0, [Damage(place / HEAD, 0, "the teacher's head")]


def repair(path: Path) -> bool:
    """Write a shard anew with its sound records alone; False if a process is writing to it.

    What is damaged beside the shards is removed: a teacher at hand writes it anew.
    """
    if path.suffix != ".shard":
        for name in (FACTS, HEAD):
            (path.parent / name).unlink(missing_ok=True)
        return True
    return _rewritten(path, lambda entries: entries)


def prune(folder: Path, limit: int | None = None, teacher: str | None = None) -> tuple[int, list[str]]:
    """Make room.

    Args:
        folder: the cache folder.
        limit: bytes that all stores together may keep; shards that were not used for longest go first, and
            of the last one the records that were written first.
        teacher: the beginning of a fingerprint; all stores of that teacher go.

    Returns:
        Bytes freed, and what could not go because a process is writing to it.
    """
    before, busy = _size(folder.glob("*/*")), list[str]()
    if teacher is not None:
        for one in contents(folder):
            if one.teacher.startswith(teacher):
                busy += [str(path) for path in sorted(one.place.glob("*.shard")) if not _dropped(path)]
    if limit is not None:
        for path in sorted(folder.glob("*/*.shard"), key=_last_used):
            excess = _size(folder.glob("*/*")) - limit
            if excess <= 0:
                break
            size = path.stat().st_size
            newest = functools.partial(_newest, excess=excess)
            gone = _dropped(path) if excess >= size else _rewritten(path, newest)
            busy += [] if gone else [str(path)]
            _remove_if_empty(path.parent)
    for path in list(folder.glob(f"*/{FACTS}")):
        _remove_if_empty(path.parent)
    return before - _size(folder.glob("*/*")), busy


def _remove_if_empty(place: Path) -> None:
    """Remove a store without shards: its head and facts are worth nothing without records."""
    if not any(place.glob("*.shard")):
        shutil.rmtree(place, ignore_errors=True)


Entries = list[tuple[bytes, int, int, int]]


def _newest(entries: Entries, excess: int) -> Entries:
    """Without so many of the oldest that `excess` bytes are freed."""
    for number, entry in enumerate(entries):
        if excess <= 0:
            return entries[number:]
        excess -= shards.RECORD.size + shards.padded(entry[2]) + shards.ENTRY.itemsize
    return []


def _rewritten(path: Path, choose: Callable[[Entries], Entries]) -> bool:
    with _locked(path) as mine:
        if not mine:
            return False
        try:
            data = shards.mapped(path)
            facts, start = shards.read_header(data)
        except NotAShard:
            _unlink(path)
            return True
        sound = [entry for entry in shards.scan(data, start).entries if _payload(data, entry) is not None]
        kept = choose(sound)
        if kept:
            _write(path, facts, data, kept)
        else:
            _unlink(path)
        return True


def _write(path: Path, facts: dict[str, Any], data: Any, kept: Entries) -> None:
    """A shard of these records in the place of the old one; who has that mapped still sees the old one."""
    head = shards.header_bytes({name: value for name, value in facts.items() if name != "shard"})
    fresh, entries, at = path.with_suffix(".new"), [], len(head)
    with told(path):
        try:
            with open(fresh, "wb") as handle:
                handle.write(head)
                for key, offset, size, rows in kept:
                    record = shards.record_bytes(key, rows, bytes(data[offset : offset + size]))
                    handle.write(record)
                    entries.append((key, at + shards.RECORD.size, size, rows))
                    at += len(record)
                os.fsync(handle.fileno())
            times = path.stat()
            os.utime(fresh, ns=(times.st_atime_ns, times.st_mtime_ns))  # looking after it is not using it
            path.with_suffix(".index").unlink(missing_ok=True)
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
    name, _ = shards.read_header(head)
    shards.write_index(path.with_suffix(".index"), name["shard"], at, entries)


def _dropped(path: Path) -> bool:
    with _locked(path) as mine:
        if mine:
            _unlink(path)
        return mine


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the writer's lock of a shard, if nobody else does."""
    with told(path):
        handle, mine = os.open(path, os.O_RDWR), False
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        yield mine
    finally:
        os.close(handle)


def _unlink(path: Path) -> None:
    for suffix in (".shard", ".index", ".used"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def _contents(place: Path) -> Contents:
    facts = read_facts(place)
    paths = sorted(place.glob("*.shard"))
    entries = [entry for path in paths for entry in _entries(path).entries]
    return Contents(
        place=place,
        form=facts["shards"]["form"],
        teacher=facts["shards"]["teacher"],
        path=facts["teacher"].get("path") or facts["teacher"].get("url"),
        records=len({entry[0] for entry in entries}),
        tokens=sum({entry[0]: entry[3] for entry in entries}.values()),
        bytes=_size(place.iterdir()),
        shards=len(paths),
        last_used=max((_last_used(path) for path in paths), default=(place / FACTS).stat().st_mtime),
    )


def _entries(path: Path) -> Found:
    try:
        data = shards.mapped(path)
        facts, start = shards.read_header(data)
    except (OSError, NotAShard):
        return Found([], 0, [])
    indexed = shards.read_index(path.with_suffix(".index"), facts["shard"], len(data))
    rest = shards.scan(data, indexed.end if indexed else start)
    return Found([*(indexed.entries if indexed else ()), *rest.entries], rest.end, rest.damaged)


def _payload(data: Any, entry: tuple[bytes, int, int, int]) -> memoryview | None:
    key, offset, size, rows = entry
    return shards.payload(data, key, Place(0, offset, size, rows))


def _last_used(path: Path) -> float:
    return max(_stat(file, "st_mtime") for file in (path, path.with_suffix(".used")))


def _size(files: Iterable[Path]) -> int:
    return int(sum(_stat(path, "st_size") for path in files if path.is_file()))


def _stat(path: Path, what: str) -> float:
    """Something about a file; 0 if another process has removed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return float(getattr(path.stat(), what))
    return 0.0
