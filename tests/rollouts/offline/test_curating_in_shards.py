"""`curate` over files says of every row what the filters say of all rows at once, in any number of shards."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sample_factory import sample

from stillhouse.errors import DataError
from stillhouse.files import STAGE, write_jsonl
from stillhouse.rollouts.offline.curation import apply_filters
from stillhouse.rollouts.offline.filter_files import filter_files
from stillhouse.rollouts.offline.filters import REGISTRY
from stillhouse.rollouts.offline.merging import merge_shards
from stillhouse.rollouts.offline.samples import Sample, samples_digest
from stillhouse.rollouts.offline.stage_files import read_rows, stage_header
from stillhouse.rollouts.offline.stored_samples import read_samples

WORDS = ["fig", "plum", "apple pie", "a pear", ""]
FILTERS = [
    REGISTRY.parse(options)
    for options in (
        {"kind": "format", "forbid": "plum plum"},
        {"kind": "overlap", "n": 2},
        {"kind": "duplicates", "source": "teacher"},
        {"kind": "length_ratio", "max_ratio": 1.4},
        {"kind": "logprob_floor", "drop_share": 0.3},
        "empty",
    )
]
HELD_OUT = ["an apple pie apple"]


def made(seed: int, source: Any, count: int) -> list[Sample]:
    random_ = random.Random(seed)
    return [
        sample(
            " ".join(random_.choices(WORDS, k=random_.randint(0, 4))),
            number,
            source=source,
            tokens=random_.randint(1, 6),
            scores={"teacher": -random_.random()},
        )
        for number in range(count)
    ]


def write(path: Path, samples: list[Sample]) -> Path:
    write_jsonl(path, [{STAGE: stage_header("responses")}, *(one.to_row() for one in samples)])
    return path


@pytest.mark.parametrize("sources", [("teacher",), ("teacher", "student")])
def test_it_says_what_the_filters_say_of_all_rows_at_once(tmp_path: Path, sources: tuple[str, ...]) -> None:
    given = {name: made(seed, name, 300) for seed, name in enumerate(sources)}
    paths = [write(tmp_path / f"{name}.jsonl", samples) for name, samples in given.items()]
    wanted = apply_filters(given, FILTERS, lambda: HELD_OUT, any_source=len(sources) == 1)
    reasons = {
        (source, given[source][place].key, drop.filter, drop.reason, drop.detail)
        for source, drops in wanted.items()
        for place, drop in drops.items()
    }
    whole = filter_files(paths, FILTERS, tmp_path / "whole.jsonl", held_out=HELD_OUT)
    rows = list(read_rows(tmp_path / "whole.dropped.jsonl"))
    assert {
        (why["source"], (row["id"], row.get("sample", 0)), why["filter"], why["reason"], why["detail"])
        for row in rows
        for why in row["dropped"]
    } == reasons
    assert {one[1] for one in reasons} == {(row["id"], row.get("sample", 0)) for row in rows}
    assert {one[2] for one in reasons} > {"format", "overlap", "duplicates", "logprob_floor"}
    assert whole.kept == 300 - len({one[1] for one in reasons})
    for shards in (2, 7):
        output = tmp_path / f"of-{shards}.jsonl"
        parts = [
            filter_files(paths, FILTERS, output, held_out=HELD_OUT, shard=(index, shards))
            for index in reversed(range(shards))
        ]
        assert sum(part.prompts for part in parts[:-1]) < 300
        assert (parts[-1].kept, parts[-1].counts) == (whole.kept, whole.counts)
        for end in ("", ".dropped"):
            same = [tmp_path / f"{name}{end}.jsonl" for name in ("whole", f"of-{shards}")]
            assert same[0].read_bytes() == same[1].read_bytes()


def test_counts_of_shards_add_up(tmp_path: Path) -> None:
    """Where no filter compares responses, those of the shards are those of the whole."""
    paths = [write(tmp_path / f"{name}.jsonl", made(3, name, 200)) for name in ("teacher", "student")]
    filters = [one for one in FILTERS if not one.compares_responses()]
    whole = filter_files(paths, filters, tmp_path / "whole.jsonl", held_out=HELD_OUT)
    parts = []
    for index in range(4):
        output = tmp_path / ("a.jsonl" if index < 3 else "b.jsonl")  # so that none of them joins the others
        parts.append(filter_files(paths, filters, output, held_out=HELD_OUT, shard=(index, 4)))
    assert not any(part.finished for part in parts)
    assert sum(part.kept for part in parts) == whole.kept
    assert sum(part.prompts for part in parts) == whole.prompts == 200
    counts: Counter[tuple[str, str, str]] = Counter()
    for part in parts:
        counts.update({(source, name, reason): count for source, name, reason, count in part.counts})
    assert counts == {(source, name, reason): count for source, name, reason, count in whole.counts}
    with pytest.raises(DataError, match=r"a\.shard-3-of-4\.jsonl is missing"):
        merge_shards(tmp_path / "a.jsonl")
    (tmp_path / "b.shard-3-of-4.jsonl").rename(tmp_path / "a.shard-3-of-4.jsonl")
    merged = merge_shards(tmp_path / "a.jsonl")
    assert (merged.kept, list(merged.counts)) == (whole.kept, whole.counts)


def test_samples_in_files_are_the_samples_and_take_few_bytes(tmp_path: Path) -> None:
    samples = made(5, "teacher", 1000)
    (stored,) = read_samples([write(tmp_path / "a.jsonl", samples)]).values()
    assert list(stored) == samples
    assert stored[-1] == samples[-1]
    assert stored[3:5] == samples[3:5]
    assert stored.digest == samples_digest(samples)
    assert stored.nbytes == 19 * len(samples)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_merge_that_was_killed_before_it_deleted_its_shards_is_ended_by_another(
    tmp_path: Path, suffix: str
) -> None:
    path = write(tmp_path / "teacher.jsonl", made(3, "teacher", 200))
    output = tmp_path / f"kept{suffix}"

    for index, name in enumerate(("kept", "other")):  # so that the last shard does not join them
        target = tmp_path / f"{name}{suffix}"
        filter_files([path], FILTERS[:4], target, held_out=HELD_OUT, shard=(index, 2))
    (tmp_path / "other.shard-1-of-2.jsonl").rename(tmp_path / "kept.shard-1-of-2.jsonl")
    shards = {one: one.read_bytes() for one in tmp_path.glob("kept.shard-?-of-2.jsonl")}
    assert merge_shards(output).written
    finished = output.read_bytes()
    for left in (list(shards), list(shards)[1:]):
        for shard in left:
            shard.write_bytes(shards[shard])
        again = merge_shards(output)
        assert (again.written, again.shards) == (False, len(left))
        assert not any(shard.exists() for shard in shards)
    one = next(iter(shards))
    one.write_bytes(shards[one])
    assert filter_files([path], FILTERS[:4], output, held_out=HELD_OUT).cached
    assert not one.exists()
    one.write_bytes(shards[one].replace(b'"id": "', b'"id": "other '))
    with pytest.raises(DataError, match=f"hold other rows or were made in another way: {one.name}"):
        merge_shards(output)
    assert one.exists()
    assert output.read_bytes() == finished
