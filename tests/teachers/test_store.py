"""What is written is read back bit for bit or not at all, whatever happens to the files."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests.children import end, start

from stillhouse.errors import EnvironmentFault
from stillhouse.teachers.store import Manifest, Record, Store, maintenance
from stillhouse.teachers.store import shard as shard_module
from stillhouse.teachers.store import store as store_module
from stillhouse.teachers.store.shard import new_path, write_shard

MANIFEST = Manifest("hidden-float32", "abc", teacher={"path": "teacher", "kind": "live"})


def key(number: int) -> str:
    return f"{number:032x}"


def record(number: int, size: int = 100) -> Record:
    data = bytearray(random.Random(number).randbytes(size + number))
    return Record(number + 1, {"a": torch.frombuffer(data, dtype=torch.uint8), "b": torch.ones(number, 2)})


def same(one: Record | None, other: Record) -> bool:
    assert one is not None
    names = one.tensors.keys()
    return names == other.tensors.keys() and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in names
    )


def filled(folder: Path, count: int = 10, first: int = 0) -> Path:
    """A store of so many records, closed; the shard that they are in."""
    before = set(shards(folder))
    with Store(folder, MANIFEST) as store:
        for number in range(first, first + count):
            assert store.put({key(number): record(number)}) == 1
    (path,) = set(shards(folder)) - before
    return path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def readable(folder: Path) -> list[int]:
    """The records that can be read; each is checked to be what was written."""
    store = Store(folder, MANIFEST)
    found = []
    for number in range(30):
        one = store.get(key(number))
        if one is not None:
            assert same(one, record(number))
            assert one.rows == number + 1
            found.append(number)
    return found


def flip(path: Path, byte: int) -> None:
    """Change a bit, in a file of its own: who has the old one mapped still sees that."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << (byte % 8)
    replace(path, bytes(data))


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def header_bytes(path: Path) -> int:
    """The size of a shard's header, after which its tensors lie without gaps."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def offset_of(path: Path, number: int) -> int:
    """Where a record's bytes are."""
    length = header_bytes(path)
    header = json.loads(path.read_bytes()[8:length])
    return length + int(header[f"{key(number)}/a"]["data_offsets"][0])


def test_everything_comes_back_and_what_is_there_stays(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    assert readable(tmp_path / "s") == list(range(10))
    assert readable(tmp_path / "nowhere") == []
    with Store(tmp_path / "s", MANIFEST) as store:
        assert len(store) == 10
        assert store.put({key(3): record(7)}) == 0
    assert readable(tmp_path / "s") == list(range(10))


def test_a_shard_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    with safe_open(filled(tmp_path, 3), "pt") as file:
        assert torch.equal(file.get_tensor(f"{key(2)}/a"), record(2).tensors["a"])
        index = json.loads(file.metadata()["index"])
    assert index["manifest"]["fingerprint"] == "abc"
    assert {name: rows for name, (rows, _) in index["records"].items()} == {key(n): n + 1 for n in range(3)}


def test_small_shards_become_one_and_a_file_cut_short_by_a_kill_is_nobodys(tmp_path: Path) -> None:
    store = Store(tmp_path, MANIFEST)
    for number in range(10):
        store.put({key(number): record(number)})
    assert len(shards(tmp_path)) == 10
    (tmp_path / f".{shards(tmp_path)[0].name}.17.tmp").write_bytes(b"half")
    reading = Store(tmp_path, MANIFEST)
    early = reading.get(key(3))
    store.close()
    assert len(shards(tmp_path)) == 1
    assert same(early, record(3)), "what was read before"
    assert same(reading.get(key(4)), record(4)), "the old files are still mapped"
    reading.refresh()
    assert all(same(reading.get(key(number)), record(number)) for number in range(10))
    assert readable(tmp_path) == list(range(10))


@pytest.mark.parametrize(("files", "shard_bytes"), [(4, 2**20), (256, 16_000)])
def test_a_long_run_leaves_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, shard_bytes: int
) -> None:
    monkeypatch.setattr(store_module, "MERGED_FILES", files)
    most = 0
    with Store(tmp_path, MANIFEST, shard_bytes=shard_bytes) as store:
        for number in range(28):
            store.put({key(number): record(number)})
            most = max(most, len(shards(tmp_path)))
            assert len(store) == number + 1
    assert most < 24
    assert 1 < len(shards(tmp_path)) < 8
    assert readable(tmp_path) == list(range(28))


def test_a_record_takes_36_bytes_of_memory(tmp_path: Path) -> None:
    """28, and 4 for each of its two tensors; as Python's own objects they took some 900."""

    def held(folder: Path, count: int) -> int:
        for first in range(0, count, 500):
            numbers = range(first, first + 500)
            part = {key(n): Record(1, {"a": torch.zeros(1), "b": torch.zeros(1)}) for n in numbers}
            write_shard(new_path(folder), MANIFEST, part)
        tracemalloc.start()
        store = Store(folder, MANIFEST)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(store) == count
        assert store.get(key(count - 1)) is not None
        return size

    held(tmp_path / "first", 500)  # what Python and regular expressions keep
    more = held(tmp_path / "more", 6000) - held(tmp_path / "few", 1000)
    assert 5000 * 36 <= more < 5000 * 36 + 10 * 10_000, "and some kB a shard"


def test_keys_are_told_apart_though_their_hashes_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (shard_module, store_module):
        monkeypatch.setattr(module, "key_hash", lambda key: np.uint64(int(key, 16) % 2))
    for number in range(4):
        with Store(tmp_path, MANIFEST) as store:
            store.put({key(number): record(number)})
    store = Store(tmp_path, MANIFEST)
    found = [store.get(key(number)) for number in range(4)]
    for number, one in enumerate(found):
        assert one is None or same(one, record(number)), "a record under the key of another"
    assert sum(one is not None for one in found) == 2, "of keys of one hash the latest is found"


def test_large_shards_are_not_written_twice(tmp_path: Path) -> None:
    with Store(tmp_path, MANIFEST, shard_bytes=1000) as store:
        store.put({key(0): record(0)})
        store.put({key(1): record(1)})
        before = shards(tmp_path)
    assert shards(tmp_path) == before
    assert readable(tmp_path) == [0, 1]


def test_a_flipped_bit_costs_its_record_alone_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "s")
    flip(path, offset_of(path, 4) + 7)
    assert readable(tmp_path / "s") == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert f"{path}: record {key(4)} is damaged" in caplog.text
    with Store(tmp_path / "s", MANIFEST) as store:
        assert store.get(key(4)) is None
        assert store.damaged == 1
        assert store.put({key(4): record(4)}) == 1, "made anew"
        assert same(store.get(key(4)), record(4))
    assert readable(tmp_path / "s") == list(range(10)), "the sound copy is found from then on"


def test_every_single_byte_of_a_shard_is_watched_over(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", 3)
    whole, header = path.read_bytes(), header_bytes(path)
    for byte in range(len(whole)):
        flip(path, byte)
        found = readable(tmp_path / "s")  # asserts that what is read is what was written
        assert byte < header or len(found) == 2, "one is damaged, and no other"
        replace(path, whole)
    assert readable(tmp_path / "s") == [0, 1, 2]


def test_cut_anywhere_a_shard_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(tmp_path / "s", 3)
    whole = path.read_bytes()
    filled(tmp_path / "s", 1, first=3)
    for size in range(0, len(whole), 7):
        replace(path, whole[:size])
        caplog.clear()
        assert readable(tmp_path / "s") == [3]
        assert f"{path}: its header is damaged or of another version; nothing of it is used" in caplog.text


def test_a_disk_that_is_full_is_named_and_what_was_written_stays(tmp_path: Path) -> None:
    assert end(start(_fill_the_disk, tmp_path)) == 0
    found = readable(tmp_path)
    assert found == list(range(4))
    filled(tmp_path, 1, first=4)
    assert readable(tmp_path) == list(range(5))


def _fill_the_disk(folder: Path) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    with Store(folder, MANIFEST) as store:
        for number in range(4):
            assert store.put({key(number): record(number)}) == 1
        with pytest.raises(EnvironmentFault, match="the disk is full"):
            store.put({key(4): record(4, 1000)})
    assert len(shards(folder)) == 4, "merging found no room either, and left all as it was"


def test_a_shard_with_a_damaged_header_or_of_another_store_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "s")
    flip(path, 20)
    before = path.read_bytes()
    assert readable(tmp_path / "s") == []
    assert f"{path}: its header is damaged or of another version; nothing of it is used" in caplog.text
    filled(tmp_path / "s")
    assert readable(tmp_path / "s") == list(range(10))
    assert path.read_bytes() == before
    with Store(tmp_path / "t", Manifest(MANIFEST.codec, "of another teacher")) as other:
        other.put({key(0): record(9)})
    shards(tmp_path / "t")[0].rename(tmp_path / "s" / "shard-7.safetensors")
    caplog.clear()
    assert readable(tmp_path / "s") == list(range(10))
    assert "belongs to another store" in caplog.text


def test_a_copy_of_the_teacher_elsewhere_uses_the_same_store(tmp_path: Path) -> None:
    filled(tmp_path)
    moved = Manifest(MANIFEST.codec, MANIFEST.fingerprint, teacher={"path": "elsewhere"})
    assert same(Store(tmp_path, moved).get(key(2)), record(2))


def test_each_writer_has_shards_of_its_own_and_sees_the_others(tmp_path: Path) -> None:
    one, two = Store(tmp_path, MANIFEST), Store(tmp_path, MANIFEST)
    one.put({key(0): record(0)})
    two.put({key(1): record(1)})
    assert key(1) not in one
    one.refresh()
    assert same(one.get(key(1)), record(1))
    two.put({key(2): record(2)})
    one.refresh()
    assert key(2) in one
    one.put({key(3): record(3)})
    one.close()
    assert len(shards(tmp_path)) == 3, "it merged its own alone"
    two.close()
    assert len(shards(tmp_path)) == 2
    assert readable(tmp_path) == [0, 1, 2, 3]


def test_the_limit_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, 12)
    size = sum(path.stat().st_size for path in shards(tmp_path))
    with Store(tmp_path, MANIFEST, limit=size + 100) as store:
        assert store.size == size
        assert store.put({key(20): record(20)}) == 0
        assert store.refused == 1
        assert store.get(key(3)) is not None
    assert "may not grow beyond" in caplog.text
    assert "teacher.limit" in caplog.text


def _write_forever(folder: Path) -> None:
    store, number = Store(folder, MANIFEST, shard_bytes=200_000), 0
    while True:
        store.put({key(number): record(number, 3000)})
        number += 1


def test_a_writer_that_is_killed_loses_at_most_its_last_record(tmp_path: Path) -> None:
    child = start(_write_forever, tmp_path)
    before = 0
    while before < 100:
        found = len(Store(tmp_path, MANIFEST))
        assert found >= before, "nothing is missing while shards are merged"
        before = found
        assert child.is_alive()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with Store(tmp_path, MANIFEST) as store:
        count = len(store)
        assert all(same(store.get(key(number)), record(number, 3000)) for number in range(count))
        assert store.put({key(count): record(count, 3000)}) == 1
    assert all(not damage for _, _, damage in maintenance.verify(tmp_path.parent))


def test_verify_names_what_is_damaged_and_repair_takes_it_out(tmp_path: Path) -> None:
    path, headless = filled(tmp_path / "a"), filled(tmp_path / "a", 1, first=11)
    flip(path, offset_of(path, 4) + 1)
    flip(path, offset_of(path, 7) + 1)
    flip(headless, 30)
    found = {where: (sound, len(damage)) for where, sound, damage in maintenance.verify(tmp_path)}
    assert found == {path: (8, 2), headless: (0, 1)}
    writing, reading = Store(tmp_path / "a", MANIFEST), Store(tmp_path / "a", MANIFEST)
    writing.put({key(20): record(20)})
    maintenance.repair(path)
    maintenance.repair(headless)
    assert not path.exists()
    assert [damage for _, _, damage in maintenance.verify(tmp_path)] == [[], []]
    assert same(reading.get(key(5)), record(5)), "who has the old file mapped still reads it"
    reading.refresh()
    assert same(reading.get(key(6)), record(6))
    writing.put({key(21): record(21)})
    writing.close()
    assert readable(tmp_path / "a") == [0, 1, 2, 3, 5, 6, 8, 9, 20, 21], "a writer is not disturbed"


def test_prune_takes_what_was_not_used_longest(tmp_path: Path) -> None:
    def fill(name: str, first: int, when: int) -> None:
        for part in range(5):
            with Store(tmp_path / name, Manifest(name, f"{name}-1")) as store:
                numbers = range(first + 2 * part, first + 2 * part + 2)
                store.put({key(number): record(number) for number in numbers})
            (path,) = (p for p in shards(tmp_path / name) if p.stat().st_mtime > 10_000)
            os.utime(path, (when + part, when + part))

    def readable_of(name: str) -> list[int]:
        store = Store(tmp_path / name, Manifest(name, f"{name}-1"))
        return [number for number in range(30) if store.get(key(number))]

    fill("old", 0, 1000)
    fill("new", 10, 2000)
    infos = maintenance.list_stores(tmp_path)
    assert [info.manifest.codec for info in infos] == ["new", "old"]
    assert [(info.records, info.shards) for info in infos] == [(10, 5), (10, 5)]
    assert infos[0].tokens == sum(number + 1 for number in range(10, 20))
    total = sum(info.bytes for info in infos)
    freed = maintenance.prune(tmp_path, limit=total - 1500)
    assert 1500 <= freed < 4000
    left = readable_of("old")
    assert left == list(range(10 - len(left), 10))
    assert 0 < len(left) < 10
    assert readable_of("new") == list(range(10, 20))
    maintenance.prune(tmp_path, limit=maintenance.list_stores(tmp_path)[0].bytes)
    assert not (tmp_path / "old").exists()
    assert readable_of("new") == list(range(10, 20))
    with Store(tmp_path / "new", Manifest("new", "new-1")) as store:
        assert same(store.get(key(13)), record(13))
    assert maintenance.list_stores(tmp_path)[0].last_used > 10_000, "reading is using"


def test_prune_takes_a_teachers_stores_and_writers_go_on(tmp_path: Path) -> None:
    filled(tmp_path / "a")
    filled(tmp_path / "b", 3)
    left_by_a_kill = tmp_path / "b" / ".shard-1.safetensors.17.tmp"
    left_by_a_kill.write_bytes(b"half")
    os.utime(left_by_a_kill, (1000, 1000))
    writing = Store(tmp_path / "a", MANIFEST)
    writing.put({key(20): record(20)})
    maintenance.prune(tmp_path, teacher="another")
    assert not left_by_a_kill.exists()
    assert readable(tmp_path / "b") == [0, 1, 2]
    assert maintenance.prune(tmp_path, teacher="abc") > 2000
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    writing.put({key(21): record(21)})
    assert same(writing.get(key(5)), record(5)), "still mapped"
    writing.refresh()
    assert writing.get(key(5)) is None
    writing.close()
    assert readable(tmp_path / "a") == [21]
