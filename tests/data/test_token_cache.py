"""Tokens of large sets are kept by content: read again where nothing has changed, made again where it has."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import TURNS, byte_tokenizer

from stillhouse.data import Data, DataConfig, Encoder, TeacherReads, chunks, load_data
from stillhouse.data.chunks import ChunkEncoder
from stillhouse.data.datasets import base
from stillhouse.data.load import encoder_of
from stillhouse.data.stored_prompts import StoredPrompts
from stillhouse.data.token_cache import TokenCache
from stillhouse.data.token_key import token_key
from stillhouse.errors import EnvironmentFault

ROWS = [{"instruction": f"say {n}", "output": f"{n}" * (1 + n % 4), "kind": str(n)} for n in range(40)]
BASE = type(byte_tokenizer())


class CountedTokenizer(BASE):  # type: ignore[misc, valid-type]
    """Notes each call in a file; may end its process at one of them."""

    calls: Path
    ends_at = -1

    def __call__(self, *given: Any, **options: Any) -> Any:
        with self.calls.open("a") as handle:
            handle.write("x")
            if handle.tell() == self.ends_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*given, **options)


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every file is large, and has several chunks."""
    monkeypatch.setattr(base, "LARGE_BYTES", 0)
    monkeypatch.setattr(base, "LARGE_ROWS", 0)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)
    monkeypatch.setattr(CountedTokenizer, "calls", tmp_path / "calls", raising=False)


def counted() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.__class__ = CountedTokenizer
    return tokenizer


def write(path: Path, rows: Iterable[Any] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(path: Any, cache: Any, tokenizer: Any = None, **options: Any) -> Data:
    given = {"train": path if isinstance(path, dict) else str(path), "token_cache": str(cache), "workers": 1}
    config = DataConfig.model_validate({"template": "plain", "ignore": ["kind"], **given, **options})
    return load_data(config, tokenizer or counted(), needs={"responses"})


def calls() -> int:
    """How often the tokenizer was asked since the last time."""
    count = CountedTokenizer.calls.stat().st_size if CountedTokenizer.calls.exists() else 0
    CountedTokenizer.calls.unlink(missing_ok=True)
    return count


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


def test_the_second_run_reads_what_the_first_has_made_and_tells_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"instruction": " "}, {"instruction": "?" * 900}])
    rules = {"no_response": "drop", "max_response": 3}
    first = loaded(path, tmp_path / "cache", **rules)
    assert calls()
    second = loaded(path, tmp_path / "cache", **rules)
    assert not calls()
    assert tuple(second.train) == tuple(first.train)
    assert [one.fields for one in second.train] == [one.fields for one in first.train]
    assert [one.facts for one in second.train] == [one.facts for one in first.train]
    assert json.dumps(second.report) == json.dumps(first.report)
    assert second.report["sets"][0]["dropped"] == {"empty prompt": 1, "no response": 1}
    assert second.report["sets"][0]["truncated"] == {"response": 27}
    several = loaded(path, tmp_path / "other", **rules, workers=2)
    assert calls()
    assert tuple(several.train) == tuple(first.train)
    assert tuple(loaded(path, tmp_path / "other", **rules).train) == tuple(first.train)
    assert not calls()


def test_rows_are_known_by_what_they_are_and_not_by_where(tmp_path: Path) -> None:
    first = loaded(write(tmp_path / "rows.jsonl"), tmp_path / "cache")
    calls()
    moved = loaded(write(tmp_path / "moved.jsonl"), tmp_path / "cache")
    assert not calls()
    assert tuple(moved.train) == tuple(first.train)
    assert moved.report["sets"][0]["path"].endswith("moved.jsonl")
    broken = [*ROWS, {"instruction": None}]
    told = [
        loaded(write(tmp_path / name, broken), tmp_path / "cache", bad_rows="drop").report["sets"][0]
        for name in ("a.jsonl", "b.jsonl", "b.jsonl")
    ]
    assert [f"{name}.jsonl:41: " in one["bad_rows"][0] for name, one in zip("abb", told, strict=True)] == [
        1
    ] * 3
    assert told[1] == told[2]


def key(
    tokenizer: Any, needs: Any = (), teacher: Any = None, name: str = "train", **options: Any
) -> str | None:
    config = DataConfig.model_validate({"template": "plain", **options})
    encoder = encoder_of(config, tokenizer, teacher)
    return token_key(ChunkEncoder(name, config.train, config, encoder, needs, teacher))


def test_what_changes_tokens_changes_the_key_and_nothing_else_does(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl"))
    other = str(write(tmp_path / "other.jsonl", [*ROWS[:-1], {**ROWS[-1], "output": "39393930"}]))
    same = str(write(tmp_path / "same.jsonl"))
    plain, longer, chat, talks = (byte_tokenizer() for _ in range(4))
    longer.add_tokens(["say"])
    chat.chat_template, talks.chat_template = TURNS, TURNS + " "
    known = key(plain, train=path)
    assert known is not None
    plain(["a", "bbbbb"], truncation=True, max_length=3)  # which the tokenizer remembers
    assert key(plain, train=same) == known
    assert key(plain, train=path, workers=3, token_cache=False, text_block=9) == known
    assert key(plain, train=path, name="valid") == known
    changed = [
        key(plain, train=other),
        key(plain, train={"path": path, "limit": 39}),
        key(plain, train={"path": path, "weight": 2}),
        key(plain, train={"path": path, "labelled": 3}),
        key(plain, train={"path": path, "fields": {"response": "kind"}}),
        key(plain, train=[path, same]),
        key(longer, train=path),
        key(plain, train=path, template="alpaca"),
        key(chat, train=path, template="chat"),
        key(talks, train=path, template="chat"),
        key(chat, train=path, template={"kind": "chat", "system": "Be brief."}),
        key(chat, train=path, template="chat", train_on="all"),
        key(plain, train=path, max_prompt=100),
        key(plain, train=path, max_response=100),
        key(plain, train=path, too_long={"prompt": "truncate_left"}),
        key(plain, train=path, bad_rows="drop"),
        key(plain, train=path, no_response="drop"),
        key(plain, train=path, ignore=["kind"]),
        key(plain, train=path, needs={"responses"}),
        key(plain, train=path, teacher_context="{prompt} {response}"),
        key(plain, train=path, row_teacher={"column": "kind", "teachers": {"1": "main"}}),
        key(plain, train=path, teacher=TeacherReads(context=50)),
        key(plain, train=path, teacher=TeacherReads(longer, other_vocabulary=True)),
        key(plain, train=path, teacher=TeacherReads(chat, other_vocabulary=True)),
    ]
    assert len({known, *changed}) == 1 + len(changed)
    assert None not in changed


def test_a_template_that_writes_the_date_has_a_key_for_each_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2031, 1, 1)

    path = str(write(tmp_path / "rows.jsonl"))
    dated, plain = byte_tokenizer(), byte_tokenizer()
    dated.chat_template, plain.chat_template = "{{ strftime_now('%d') }}" + TURNS, TURNS
    before = [key(one, train=path, template="chat") for one in (dated, plain)]
    monkeypatch.setattr(datetime, "date", Tomorrow)
    after = [key(one, train=path, template="chat") for one in (dated, plain)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]


def test_datasets_of_the_library_are_known_by_their_rows(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list([*ROWS[::-1]]).save_to_disk(tmp_path / "turned")
    whole.select(range(39, -1, -1)).save_to_disk(tmp_path / "again")
    found = [
        loaded({"kind": "hf", "path": str(tmp_path / name)}, tmp_path / "cache").train
        for name in ("saved", "turned", "again")
    ]
    assert len(entries(tmp_path / "cache")) == 2
    assert tuple(found[1]) == tuple(found[2]) != tuple(found[0])


@pytest.mark.parametrize("damage", ["a byte", "cut", "gone", "no manifest", "another manifest"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    path = write(tmp_path / "rows.jsonl")
    first = tuple(loaded(path, tmp_path / "cache").train)
    [entry] = entries(tmp_path / "cache")
    [file] = entry.glob("*.arrow")
    content = file.read_bytes()
    if damage == "a byte":
        at = len(content) // 2
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "gone":
        file.unlink()
    else:
        (entry / "tokens.json").write_text("" if damage == "no manifest" else "[]")
    calls()
    with caplog.at_level(logging.WARNING):
        assert tuple(loaded(path, tmp_path / "cache").train) == first
    assert calls()
    assert "damaged tokens" in caplog.text
    assert tuple(loaded(path, tmp_path / "cache").train) == first
    assert not calls()


def _load(given: tuple[Path, Path, int]) -> str:
    path, cache, ends_at = given
    CountedTokenizer.ends_at = ends_at
    return repr(tuple(loaded(path, cache).train))


def test_a_killed_process_leaves_nothing_and_of_two_one_makes_the_tokens(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "rows.jsonl"), tmp_path / "cache"
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=_load, args=((path, cache, 5),))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert entries(cache) == []
    assert len(list(cache.glob(".*.tmp"))) == 1
    calls()
    with fork.Pool(2) as pool:
        found = pool.map(_load, [(path, cache, -1)] * 2, chunksize=1)
    made = calls()
    assert len(entries(cache)) == 1
    assert list(cache.glob(".*.tmp")) == []
    shutil.rmtree(cache)
    alone = repr(tuple(loaded(path, cache).train))
    assert (found, made) == ([alone, alone], calls())


def _load_and_stay(path: Path, cache: Path, pipe: Any) -> None:
    found = loaded(path, cache).train
    pipe.send(len(found))
    pipe.recv()
    pipe.send(repr(tuple(found)))


def test_pruning_takes_what_was_used_longest_ago_and_nothing_that_is_in_use(tmp_path: Path) -> None:
    fork, cache = multiprocessing.get_context("fork"), TokenCache(tmp_path / "cache")
    paths = [write(tmp_path / f"{n}.jsonl", ROWS[n:]) for n in range(4)]
    with fork.Pool(1) as pool:
        texts = pool.map(_load, [(path, cache.folder, -1) for path in paths])
    made = {one.told[1]: one for one in cache.entries()}
    assert [made[str(path)].prompts for path in paths] == [40, 39, 38, 37]
    assert not any(one.in_use for one in made.values())
    for age, path in enumerate(paths):
        os.utime(made[str(path)].folder / "tokens.json", (1e9 - age, 1e9 - age))
    here, there = fork.Pipe()
    user = fork.Process(target=_load_and_stay, args=(paths[3], cache.folder, there))
    user.start()
    here.recv()
    assert [one.told[1] for one in cache.entries()] == [str(paths[n]) for n in (3, 0, 1, 2)]
    (cache.folder / f".{'0' * 32}.killed.tmp").mkdir()
    (cache.folder / f".{'0' * 32}.killed.tmp" / "half").write_bytes(b"x" * 1000)
    whole = sum(one.bytes for one in made.values())
    freed, used = cache.prune(whole - made[str(paths[2])].bytes)
    assert (freed, used) == (made[str(paths[2])].bytes + 1000, [])
    assert [one.told[1] for one in cache.entries()] == [str(paths[n]) for n in (3, 0, 1)]
    freed, used = cache.prune(0)
    assert [(one.told[1], one.in_use) for one in used] == [(str(paths[3]), True)]
    assert [one.folder for one in cache.entries()] == [used[0].folder]
    here.send("read them")
    assert here.recv() == texts[3]
    user.join()
    assert cache.prune(0)[1] == cache.entries() == []


def test_where_there_are_no_locks_the_work_of_others_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write(tmp_path / "rows.jsonl"), tmp_path / "cache"
    loaded(path, cache)
    [entry] = entries(cache)
    shutil.rmtree(entry)
    others = cache / f".{entry.name}.other.tmp"
    others.mkdir()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        assert len(loaded(path, cache).train) == 40
        assert [one.folder for one in TokenCache(cache).prune(0)[1]] == [entry]  # nobody knows who uses it
    assert others.exists()
    shutil.rmtree(entry)
    loaded(path, cache)
    assert not others.exists()


def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "rows.jsonl"), tmp_path / "cache"
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(EnvironmentFault, match=rf"{cache}: the disk is full.* set data\.token_cache"):
            loaded(path, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert entries(cache) == list(cache.glob(".*.tmp")) == []
    assert len(loaded(path, cache).train) == 40


def test_without_a_folder_or_with_values_that_are_no_data_nothing_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import pandas

    path = write(tmp_path / "rows.jsonl")
    with caplog.at_level(logging.WARNING):
        assert len(loaded(path, path / "cache").train) == 40
    assert f"{path / 'cache'}: cannot be written; the tokens of data.train are not kept" in caplog.text
    table = pandas.DataFrame(ROWS)
    table["when"] = pandas.Timestamp("2026-01-01 00:00:00.000000001")
    table.to_parquet(tmp_path / "rows.parquet")
    with caplog.at_level(logging.WARNING):
        found = loaded(tmp_path / "rows.parquet", tmp_path / "cache").train
    assert found[3].facts["when"] == table["when"][3]
    assert "not kept, because rows hold values of pandas" in caplog.text
    assert entries(tmp_path / "cache") == []


def test_tokens_of_the_cache_are_read_from_other_processes_and_as_pickles(tmp_path: Path) -> None:
    import pickle

    found = loaded(write(tmp_path / "rows.jsonl"), tmp_path / "cache").train
    assert isinstance(found, StoredPrompts)
    assert tuple(pickle.loads(pickle.dumps(found))) == tuple(found)
    assert isinstance(loaded(tmp_path / "rows.jsonl", tmp_path / "cache").encoder, Encoder)
