"""Stage files: torn anywhere they go on, made by many they are the same, made otherwise they are not used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.errors import DataError
from stillhouse.rollouts.offline.indexed_rows import IndexedRows
from stillhouse.rollouts.offline.shards import finished_shards
from stillhouse.rollouts.offline.stage_files import (
    StageFile,
    StageMismatch,
    header_differences,
    read_header,
    read_rows,
    stage_header,
    write_rows,
)

HEAD = stage_header("responses", seed=1, sampling={"temperature": 0.8})
ROWS = [{"number": number, "response": f"text {number} ü\n"} for number in range(5)]


def whole(folder: Path) -> bytes:
    stage = StageFile(folder / "whole.jsonl", HEAD)
    stage.append(ROWS)
    assert stage.merge(len(ROWS))
    return stage.path.read_bytes()


def test_torn_at_any_byte_it_goes_on_to_the_same_file(tmp_path: Path) -> None:
    wanted = whole(tmp_path)
    for cut in range(len(wanted) + 1):
        stage = StageFile(tmp_path / "torn.jsonl", HEAD)
        stage.shard.write_bytes(wanted[:cut])
        begun = stage.partial_rows()
        assert list(begun) == list(range(max(0, wanted[:cut].count(b"\n") - 1)))
        if len(begun) < len(ROWS):
            assert not stage.merge(len(ROWS))
            stage.append(ROWS[len(begun) :])
        assert stage.merge(len(ROWS))
        assert stage.path.read_bytes() == wanted
        assert stage.shards() == []
        stage.path.unlink()


def test_a_finished_file_that_is_cut_is_never_taken_for_whole(tmp_path: Path) -> None:
    wanted = whole(tmp_path)
    stage = StageFile(tmp_path / "whole.jsonl", HEAD)
    ends = [at for at, byte in enumerate(wanted) if byte == ord("\n")]
    for cut in range(len(wanted)):
        stage.path.write_bytes(wanted[:cut])
        if cut in ends[1:]:  # an editor took the last end of line alone away
            assert len(list(read_rows(stage.path))) == ends.index(cut)
        elif cut - 1 not in ends and cut not in ends:
            with pytest.raises(DataError, match=r"is damaged|is no stage file"):
                stage.rows()


def test_parts_of_several_processes_join_to_the_same_bytes(tmp_path: Path) -> None:
    wanted = whole(tmp_path)
    stages = [StageFile(tmp_path / "shared.jsonl", HEAD, rank, 3) for rank in range(3)]
    for rank in (2, 0, 1):
        assert not stages[rank].merge(len(ROWS))
        stages[rank].append(ROWS[rank::3][::-1])
    assert stages[1].merge(len(ROWS))
    assert stages[1].path.read_bytes() == wanted
    assert stages[0].rows() == ROWS


def test_parts_of_another_number_of_processes_are_used(tmp_path: Path) -> None:
    for rank in range(2):
        StageFile(tmp_path / "a.jsonl", HEAD, rank, 2).append(ROWS[rank:4:2])
    alone = StageFile(tmp_path / "a.jsonl", HEAD)
    assert sorted(alone.partial_rows()) == [0, 1, 2, 3]
    alone.append(ROWS[4:])
    assert alone.merge(5)
    assert alone.rows() == ROWS


def test_a_long_torn_line_is_cut(tmp_path: Path) -> None:
    stage = StageFile(tmp_path / "long.jsonl", HEAD)
    stage.append(ROWS[:1])
    with open(stage.shard, "ab") as handle:
        handle.write(b'{"number": 1, "response": "' + b"x" * 200_000)
    stage.append(ROWS[1:])
    assert [row["number"] for row in read_rows(stage.shard)] == [0, 1, 2, 3, 4]


def test_what_was_made_otherwise_is_refused_and_kept_aside(tmp_path: Path) -> None:
    whole(tmp_path)
    other = StageFile(
        tmp_path / "whole.jsonl", stage_header("responses", seed=1, sampling={"temperature": 1.0})
    )
    with pytest.raises(StageMismatch, match=r"sampling\.temperature is 0\.8, not 1\.0"):
        other.rows()
    before = other.path.read_bytes()
    ((place, differing),) = other.rename_stale()
    assert differing == ["sampling.temperature is 0.8, not 1.0"]
    assert place.name == "whole.stale-1.jsonl"
    assert place.read_bytes() == before
    assert other.rows() is None
    part = StageFile(tmp_path / "whole.jsonl", HEAD)
    part.append(ROWS[:1])
    with pytest.raises(StageMismatch):
        other.partial_rows()
    assert [moved.name for moved, _ in other.rename_stale()] == ["whole.shard-0-of-1.stale-1.jsonl"]


def test_other_versions_alone_make_nothing_stale() -> None:
    assert header_differences(HEAD, {**HEAD, "versions": {"torch": "1.0"}}) == []
    assert header_differences(HEAD, {**HEAD, "extra": 3}) == ["extra is 3, not missing"]


def test_damage_in_the_middle_and_files_without_a_header_are_named(tmp_path: Path) -> None:
    path = tmp_path / "whole.jsonl"
    lines = whole(tmp_path).split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], b"{broken", *lines[2:]]))
    with pytest.raises(DataError, match=r"whole\.jsonl:3: is damaged"):
        StageFile(path, HEAD).rows()
    path.write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(DataError, match="is no stage file"):
        read_header(path)


def test_rows_of_the_65537th_file_are_its_own(tmp_path: Path) -> None:
    first, last = tmp_path / "first.jsonl", tmp_path / "last.jsonl"
    write_rows(first, HEAD, ROWS[:1])
    write_rows(last, HEAD, ROWS[1:2])
    rows = IndexedRows([first] * 2**16 + [last])
    assert rows[1] == ROWS[1]


def test_shards_that_hold_a_row_twice_are_not_joined(tmp_path: Path) -> None:
    for index, rows in enumerate((ROWS[:3], ROWS[2:4])):
        StageFile(tmp_path / "all.jsonl", HEAD, index, 2).append(rows, share=len(rows))
    with pytest.raises(DataError, match="hold some rows twice"):
        finished_shards(tmp_path / "all.jsonl")


def test_a_damaged_page_of_a_parquet_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"number": n, "response": f"text {n} " * 20} for n in range(200)]
    write_rows(path, HEAD, rows)
    whole = path.read_bytes()
    assert list(read_rows(path)) == rows
    at = whole.index(b"\x28\xb5\x2f\xfd") + 30  # within a page compressed by zstd
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(DataError, match=r"a\.parquet: is damaged \(.*checksum"):
        list(read_rows(path))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_header(path)
