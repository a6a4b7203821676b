"""Stage files as Parquet, and in stores that fsspec knows: the same rows, shards and messages as on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_curating_in_shards import FILTERS, HELD_OUT, made, write

from stillhouse.core.stage_tables import table_header, table_rows, write_table
from stillhouse.data.datasets import dataset_at
from stillhouse.data.reading import Reading
from stillhouse.errors import ConfigError, DataError, EnvironmentFault
from stillhouse.files import atomic
from stillhouse.rollouts.offline.filter_files import filter_files
from stillhouse.rollouts.offline.merging import merge_shards
from stillhouse.rollouts.offline.stage_files import StageFile, read_header, read_rows, stage_header
from stillhouse.urls import path_at

HEAD = stage_header("responses", seed=1)
ROWS = [{"number": number, "prompt": "p", "response": f"text {number} ü\n"} for number in range(7)]

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**31), 2**31 - 1), st.floats(allow_nan=False),
    st.text(max_size=5), st.lists(st.integers(0, 99), max_size=3), st.lists(st.text(max_size=2), max_size=2),
    st.lists(st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2), max_size=2),
)  # fmt: skip
NAMES = st.sampled_from(
    ["number", "id", "prompt", "token_ids", "logprobs", "finished", "facts", "sample", "x"]
)


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()
    found.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(NAMES, VALUES, max_size=6), max_size=6))
def test_any_rows_come_back_from_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / "any.parquet"
    with path.open("wb") as handle:
        write_table(handle, HEAD, rows)
    assert table_header(path) == HEAD
    assert list(table_rows(path)) == rows


@pytest.mark.parametrize("place", ["{folder}", "memory://bucket/run", "file://{folder}"])
@pytest.mark.parametrize("end", ["jsonl", "parquet"])
def test_shards_join_anywhere(tmp_path: Path, place: str, end: str) -> None:
    path = path_at(f"{place.format(folder=tmp_path)}/a.{end}")
    for index in (1, 0):
        shard = StageFile(path, HEAD, index, 2)
        own = ROWS[index::2]
        shard.append(own[:2], len(own))
        with pytest.raises(DataError, match=f"shard-{index}-of-2.jsonl is unfinished, 2 of {len(own)} rows"):
            merge_shards(path)
        again = StageFile(path, HEAD, index, 2)  # as another process, which goes on
        again.append([row for row in own if row["number"] not in again.partial_rows()], len(own))
    assert merge_shards(path).written
    assert [one.name for one in path.parent.iterdir()] == [f"a.{end}"]
    assert read_header(path) == HEAD
    assert list(read_rows(path)) == ROWS == StageFile(path, HEAD).rows()
    rows = list(dataset_at(path).rows(Reading()))
    assert [row.response for row in rows] == [row["response"] for row in ROWS]
    assert rows[0].location.startswith(str(path))


@pytest.mark.parametrize("end", ["jsonl", "parquet"])
def test_curating_in_a_store_is_curating_on_disk(tmp_path: Path, end: str) -> None:
    on_disk = [write(tmp_path / f"{name}.jsonl", made(3, name, 150)) for name in ("teacher", "student")]
    wanted = filter_files(on_disk, FILTERS, tmp_path / "kept.jsonl", held_out=HELD_OUT)
    stored = []
    for path in on_disk:
        stage = StageFile(path_at(f"memory://bucket/{path.stem}.{end}"), read_header(path) or {})
        stage.append([{**row, "number": number} for number, row in enumerate(read_rows(path))])
        assert stage.merge(150)
        stored.append(stage.path)
    output = path_at(f"memory://bucket/kept.{end}")
    for index in range(2):
        result = filter_files(stored, FILTERS, output, held_out=HELD_OUT, shard=(index, 2))
    assert (result.kept, result.counts) == (wanted.kept, wanted.counts)
    for name in ("kept", "kept.dropped"):
        assert list(read_rows(path_at(f"memory://bucket/{name}.{end}"))) == list(
            read_rows(tmp_path / f"{name}.jsonl")
        )
    again = filter_files(stored, FILTERS, output, held_out=HELD_OUT)
    assert again.cached
    assert (again.kept, again.counts) == (wanted.kept, wanted.counts)


def test_patterns_and_packed_files_are_read_from_a_store(store: Any) -> None:
    lines = [json.dumps({"prompt": f"q{number}", "response": "a"}) + "\n" for number in range(3)]
    for number, line in enumerate(lines):
        store.pipe(f"/bucket/part-{number}.jsonl", line.encode())
    with fsspec.open("memory://bucket/all.jsonl.gz", "wb", compression="gzip") as handle:
        handle.write("".join(lines).encode())
    for path in ("memory://bucket/part-*.jsonl", "memory://bucket/all.jsonl.gz"):
        found = [row.instruction for row in dataset_at(path).rows(Reading())]
        assert found == ["q0", "q1", "q2"]
    with pytest.raises(DataError, match=r"memory://bucket/part-7\.jsonl: no such file"):
        list(dataset_at("memory://bucket/part-7.jsonl").rows(Reading()))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, store: Any) -> None:
    with pytest.raises(ConfigError, match="fsspec knows no zz://"):
        path_at("zz://bucket/a.jsonl")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(EnvironmentFault, match="the package for s3:// is not installed"):
        path_at("s3://bucket/a.jsonl")
    path = path_at("memory://bucket/a.jsonl")
    monkeypatch.setattr(type(store), "put_file", _refuses)
    with pytest.raises(
        EnvironmentFault, match=r"a\.shard-0-of-1\.part-0\.jsonl: cannot be written \(Permiss"
    ):
        StageFile(path, HEAD).append(ROWS)
    assert not path.exists()


def _refuses(*given: Any, **options: Any) -> None:
    raise PermissionError("no right to write")


def test_nothing_is_uploaded_of_a_block_that_fails() -> None:
    path = path_at("memory://bucket/a.jsonl")
    with pytest.raises(TypeError), atomic(path) as handle:
        handle.writelines(["half", None])
    assert not path.exists()
