"""What is written is read back bit for bit or not at all, whatever happens to the files."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from tests.children import end, start

from stillhouse.errors import EnvironmentFault
from stillhouse.teachers.store import Store, care
from stillhouse.teachers.store import shard as shards

FACTS = {"form": "hidden-float32", "teacher": "abc"}


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def payload(number: int, size: int = 100) -> bytes:
    return random.Random(number).randbytes(size + number)


def filled(folder: Path, count: int = 10, first: int = 0) -> Path:
    """A store of so many records, closed; its only shard."""
    with Store(folder, FACTS) as store:
        for number in range(first, first + count):
            assert store.put([(key(number), number + 1, payload(number))]) == 1
    return folder / "00000.shard"


def readable(folder: Path) -> list[int]:
    """The records that can be read; each is checked to be what was written."""
    store = Store(folder, FACTS)
    found = []
    for number in range(30):
        data = store.get(key(number))
        if data is not None:
            assert bytes(data) == payload(number)
            found.append(number)
    return found


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << (byte % 8)
    path.write_bytes(data)


def offset_of(folder: Path, number: int) -> int:
    return Store(folder, FACTS).places()[key(number)].offset


@pytest.mark.parametrize("index", ["as written", "missing", "damaged", "another shard's"])
def test_everything_comes_back_with_or_without_an_index(tmp_path: Path, index: str) -> None:
    path = filled(tmp_path / "s")
    beside = path.with_suffix(".index")
    if index == "missing":
        beside.unlink()
    elif index == "damaged":
        flip(beside, 60)
    elif index == "another shard's":
        beside.write_bytes(filled(tmp_path / "other", 3).with_suffix(".index").read_bytes())
    assert readable(tmp_path / "s") == list(range(10))
    assert Store(tmp_path / "s", FACTS).places()[key(4)].rows == 5
    assert readable(tmp_path / "nowhere") == []
    with Store(tmp_path / "s", FACTS) as store:
        assert store.put([(key(3), 1, b"other")]) == 0, "what is there stays"


def test_a_tail_torn_anywhere_is_cut_by_the_next_writer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = filled(tmp_path / "whole").read_bytes()
    last = offset_of(tmp_path / "whole", 9) - shards.RECORD.size
    for cut in (*range(last + 1, len(whole), 17), last + 40, len(whole) - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        path = folder / "00000.shard"
        path.write_bytes(whole[:cut])
        assert readable(folder) == list(range(9)), "a reader passes over the tail"
        looking = Store(folder, FACTS)
        caplog.clear()
        filled(folder, 3, first=9)
        assert f"{path}: the last {cut - last} bytes are no whole record" in caplog.text
        assert readable(folder) == list(range(12))
        looking.refresh()
        assert looking.get(key(11)) is not None, "who looked at the torn shard sees what came behind it"
        path.with_suffix(".index").unlink()
        assert readable(folder) == list(range(12))
        assert all(not damage for _, _, damage in care.verify(tmp_path / str(cut)))


def test_a_flipped_bit_costs_its_record_alone_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "s")
    at = offset_of(tmp_path / "s", 4)
    flip(path, at + 7)
    assert readable(tmp_path / "s") == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert f"{path}: the record at byte {at} is damaged" in caplog.text
    with Store(tmp_path / "s", FACTS) as store:
        assert store.get(key(4)) is None
        assert store.damaged == 1
        assert store.put([(key(4), 5, payload(4))]) == 1, "made anew"
        assert store.get(key(4)) is not None
    assert readable(tmp_path / "s") == list(range(10)), "the sound copy is found from then on"


def test_every_single_byte_of_a_shard_is_watched_over(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", 3)
    whole = path.read_bytes()
    path.with_suffix(".index").unlink()
    for byte in range(len(whole)):
        flip(path, byte)
        found = readable(tmp_path / "s")  # asserts that what is read is what was written
        assert len(found) in (0, 2, 3), "three where it was a byte of padding"
        path.write_bytes(whole)


def test_every_single_byte_of_an_index_is_watched_over(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", 3)
    beside, shard = path.with_suffix(".index"), path.read_bytes()
    whole = beside.read_bytes()
    for byte in range(len(whole)):
        flip(beside, byte)
        assert readable(tmp_path / "s") == [0, 1, 2]
        filled(tmp_path / "s", 1, first=3)  # a writer that went by a wrong index would write over records
        assert readable(tmp_path / "s") == [0, 1, 2, 3]
        path.write_bytes(shard)
        beside.write_bytes(whole)


def test_cut_anywhere_with_its_index_left_a_shard_gives_what_is_whole(tmp_path: Path) -> None:
    path = filled(tmp_path / "s", 3)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = readable(tmp_path / "s")
        assert found == list(range(len(found)))
        assert len(found) < 3 or size >= len(whole) - 8, "but for the zeros at the end"


def test_a_disk_that_is_full_is_named_and_what_was_written_stays(tmp_path: Path) -> None:
    assert end(start(_fill_the_disk, tmp_path)) == 0
    found = readable(tmp_path)
    assert found == list(range(len(found)))
    assert found
    filled(tmp_path, 1, first=len(found))
    assert readable(tmp_path) == list(range(len(found) + 1))


def _fill_the_disk(folder: Path) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with Store(folder, FACTS) as store:
        for number in range(4):
            assert store.put([(key(number), 1, payload(number))]) == 1
        with pytest.raises(EnvironmentFault, match="the disk is full"):
            store.put([(key(4), 1, payload(4, 900))])


def test_a_damaged_record_header_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(tmp_path / "s")
    flip(path, offset_of(tmp_path / "s", 4) - 30)
    assert readable(tmp_path / "s") == [0, 1, 2, 3, 5, 6, 7, 8, 9], "by the index"
    path.with_suffix(".index").unlink()
    caplog.clear()
    assert readable(tmp_path / "s") == [0, 1, 2, 3, 5, 6, 7, 8, 9], "by looking for the next one"
    assert "are damaged" in caplog.text


def test_a_shard_with_a_damaged_beginning_or_of_another_store_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "s")
    flip(path, 20)
    before = path.read_bytes()
    assert readable(tmp_path / "s") == []
    assert f"{path}: its header is damaged; nothing of it is used" in caplog.text
    filled(tmp_path / "s")
    assert readable(tmp_path / "s") == list(range(10))
    assert path.read_bytes() == before
    with Store(tmp_path / "t", {**FACTS, "teacher": "other"}) as other:
        other.put([(key(0), 1, b"of another teacher")])
    (tmp_path / "t" / "00000.shard").rename(tmp_path / "s" / "00007.shard")
    caplog.clear()
    assert readable(tmp_path / "s") == list(range(10))
    assert "belongs to another store" in caplog.text


def test_each_writer_has_a_shard_of_its_own_and_sees_the_others(tmp_path: Path) -> None:
    one, two = Store(tmp_path, FACTS), Store(tmp_path, FACTS)
    one.put([(key(0), 1, payload(0))])
    two.put([(key(1), 1, payload(1))])
    assert sorted(path.name for path in tmp_path.glob("*.shard")) == ["00000.shard", "00001.shard"]
    assert key(1) not in one
    one.refresh()
    assert bytes(one.get(key(1)) or b"") == payload(1)
    two.put([(key(2), 1, payload(2))])
    one.refresh()
    assert one.get(key(2)) is not None
    one.close()
    with Store(tmp_path, FACTS) as three:
        three.put([(key(3), 1, payload(3))])
    assert len(list(tmp_path.glob("*.shard"))) == 2, "a shard without a writer is taken up again"
    two.close()
    assert readable(tmp_path) == [0, 1, 2, 3]


def test_full_shards_are_followed_by_new_ones_and_the_limit_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path, FACTS, shard_bytes=500) as store:
        for number in range(12):
            store.put([(key(number), 1, payload(number))])
    assert len(list(tmp_path.glob("*.shard"))) > 2
    assert readable(tmp_path) == list(range(12))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.shard"))
    with Store(tmp_path, FACTS, limit=size + 100) as store:
        assert store.put([(key(20), 1, payload(20))]) == 0
        assert store.refused == 1
        assert store.get(key(3)) is not None
    assert "may not grow beyond" in caplog.text
    assert "teacher.limit" in caplog.text


def _write_forever(folder: Path) -> None:
    store, number = Store(folder, FACTS, shard_bytes=200_000), 0
    while True:
        store.put([(key(number), 1, payload(number, 3000))])
        number += 1


def test_a_writer_that_is_killed_loses_at_most_its_last_record(tmp_path: Path) -> None:
    child = start(_write_forever, tmp_path)
    while len(Store(tmp_path, FACTS)) < 40:
        assert child.is_alive()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with Store(tmp_path, FACTS) as store:
        count = len(store)
        assert all(bytes(store.get(key(n)) or b"") == payload(n, 3000) for n in range(count))
        assert store.put([(key(count), 1, payload(count, 3000))]) == 1, "the lock has gone with the process"
    assert all(not damage for _, _, damage in care.verify(tmp_path.parent))


def kept(root: Path, name: str, count: int, first: int = 0) -> Path:
    """A store as a cached teacher makes it, within a cache folder."""
    place = root / name
    path = filled(place, count, first)
    care.write_facts(place, {"shards": {"form": name, "teacher": f"{name}-1"}, "teacher": {"path": "p"}})
    return path


def test_verify_names_what_is_damaged_and_repair_takes_it_out(tmp_path: Path) -> None:
    path = kept(tmp_path, "a", 10)
    flip(path, offset_of(tmp_path / "a", 4) + 1)
    flip(path, offset_of(tmp_path / "a", 7) - 36)
    ((where, sound, damage),) = care.verify(tmp_path)
    assert (where, sound, len(damage)) == (path, 8, 2)
    writing = Store(tmp_path / "a", FACTS)
    writing.put([(key(20), 1, payload(20))])
    assert not care.repair(path), "somebody writes to it"
    writing.close()
    looking = Store(tmp_path / "a", FACTS)
    assert care.repair(path)
    ((_, sound, damage),) = care.verify(tmp_path)
    assert (sound, damage) == (9, [])
    assert looking.get(key(5)) is not None, "who has the old file mapped still reads it"
    looking.refresh()
    assert looking.get(key(6)) is not None
    assert readable(tmp_path / "a") == [0, 1, 2, 3, 5, 6, 8, 9, 20]


def test_prune_takes_what_was_not_used_longest_and_the_oldest_of_a_shard(tmp_path: Path) -> None:
    old, new = kept(tmp_path, "old", 10), kept(tmp_path, "new", 10, first=10)
    for path, when in ((old, 1000), (new, 2000)):
        for file in (path, path.with_suffix(".used")):
            file.touch()
            os.utime(file, (when, when))
    assert [one.form for one in care.contents(tmp_path)] == ["new", "old"]
    total = sum(one.bytes for one in care.contents(tmp_path))
    freed, busy = care.prune(tmp_path, limit=total - 300)
    assert busy == []
    assert 300 <= freed < 900
    left = readable(tmp_path / "old")
    assert left == list(range(10 - len(left), 10))
    assert 0 < len(left) < 10
    assert readable(tmp_path / "new") == list(range(10, 20))
    care.prune(tmp_path, limit=care.contents(tmp_path)[0].bytes)
    assert not (tmp_path / "old").exists()
    assert readable(tmp_path / "new") == list(range(10, 20))
    writing = Store(tmp_path / "new", FACTS)
    writing.put([(key(20), 1, payload(20))])
    assert care.prune(tmp_path, teacher="new")[1] == [str(new)]
    writing.close()
    assert care.prune(tmp_path, teacher="new")[1] == []
    assert not (tmp_path / "new").exists()
