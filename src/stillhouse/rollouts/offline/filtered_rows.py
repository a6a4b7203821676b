"""From what the shards of `stillhouse curate` have checked to the files of kept and of dropped rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.rollouts.offline.curation import NO_RESPONSE
from stillhouse.rollouts.offline.filters import REGISTRY, Drop, Filter, FilterContext
from stillhouse.rollouts.offline.indexed_rows import IndexedRows, Row
from stillhouse.rollouts.offline.samples import Sample, SamplesOnDisk
from stillhouse.rollouts.offline.stage_files import read_header, read_rows, write_rows
from stillhouse.rollouts.offline.stored_samples import key_hash

Count = tuple[str, str, str, int]
"""(source, filter, reason, how many responses)."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of a response.

    Example: `Checked("teacher", 1, Drop("cut at the length limit", filter="truncated"))`
    """

    source: str
    place: int
    """Of the filter that drops it, among all; -1 for one that does not exist; their number if none does."""
    drop: Drop | None = None

    def as_json(self) -> dict[str, Any]:
        """As in a row of a shard."""
        found = {"source": self.source, "place": self.place}
        return found if self.drop is None else {**found, **_drop_fields(self.drop)}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Checked:
        """From a row of a shard."""
        found = row["checked"]
        drop = Drop(found["reason"], found["detail"], found["filter"]) if "filter" in found else None
        return cls(found["source"], found["place"], drop)

    def reason(self) -> dict[str, Any]:
        """As in a dropped row."""
        assert self.drop is not None
        return {"source": self.source, **_drop_fields(self.drop)}


def _drop_fields(drop: Drop) -> dict[str, str]:
    return {"filter": drop.filter, "reason": drop.reason, "detail": drop.detail}


class Prompts:
    """Which rows belong to the same prompt; prompts are in the order of their first rows. In memory are 12
    bytes a row, and 32 while it is made.

    Example:
        >>> Prompts(np.array([7, 9, 7])).rows_of(0)
        [0, 2]
    """

    def __init__(self, keys: NDArray[np.int64]) -> None:
        """Group rows by the hash of their key."""
        places = np.int32 if len(keys) < 2**31 else np.int64
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        begins = np.ones(len(keys), dtype=bool)
        begins[1:] = ordered[1:] != ordered[:-1]
        del ordered
        first = order[begins].astype(places)
        prompt = np.empty_like(first)
        prompt[np.argsort(first)] = np.arange(len(first), dtype=places)
        self.of_row = np.empty(len(keys), dtype=places)
        """The prompt of each row."""
        self.of_row[order] = prompt[np.cumsum(begins, dtype=places) - 1]
        del order, begins, first, prompt
        self._rows = np.argsort(self.of_row, kind="stable").astype(places)
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(self.of_row))]).astype(places)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def rows_of(self, prompt: int) -> list[int]:
        """The rows of a prompt."""
        found: list[int] = self._rows[self._starts[prompt] : self._starts[prompt + 1]].tolist()
        return found

    def rows_in(self, block: range) -> list[int]:
        """The rows of neighbouring prompts, prompt after prompt."""
        found: list[int] = self._rows[self._starts[block.start] : self._starts[block.stop]].tolist()
        return found

    def count(self, block: range) -> int:
        """How many rows neighbouring prompts have."""
        return int(self._starts[block.stop] - self._starts[block.start])


def applies(one: Filter, source: str, sources: int) -> bool:
    """Whether a filter is for the responses of a source; of a single source it is."""
    return sources == 1 or one.source in ("all", source)


def reasons_of(checked: Iterable[Checked], sources: Sequence[str]) -> list[Checked]:
    """Why a prompt is dropped, given all of its responses; none if it is kept."""
    there = list(checked)
    found = [one for one in there if one.drop is not None]
    if {"teacher", "student"} <= set(sources):
        missing = [name for name in sources if name not in {one.source for one in there}]
        found += [Checked(name, -1, NO_RESPONSE) for name in missing]
    return found


def counts_of(reasons: Iterable[Sequence[Checked]], sources: Sequence[str]) -> tuple[int, list[Count]]:
    """How many prompts are kept, and how many responses are dropped for each reason.

    Args:
        reasons: of each prompt.
        sources: in their order.
    """
    kept = 0
    counts: Counter[tuple[int, int, str, str]] = Counter()
    for found in reasons:
        kept += not found
        for one in found:
            assert one.drop is not None
            counts[sources.index(one.source), one.place, one.drop.filter, one.drop.reason] += 1
    ordered = sorted(counts.items(), key=lambda item: item[0][:2])
    return kept, [(sources[source], name, reason, count) for (source, _, name, reason), count in ordered]


def dropped_path(output: Path) -> Path:
    """Where the rows that are not kept are written."""
    return output.with_name(f"{output.stem}.dropped{output.suffix}")


class _SomeSamples(SamplesOnDisk):
    """The samples of some rows of shards."""

    def __init__(self, rows: IndexedRows, numbers: NDArray[np.int64]) -> None:
        self._rows = rows
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, place: int) -> Sample:
        """See the base class."""
        return Sample.from_row(self._rows[int(self._numbers[place])]["row"])


class _Verdicts:
    """What became of the rows of all shards, after the filters that compare responses too."""

    def __init__(self, header: Mapping[str, Any], rows: IndexedRows) -> None:
        self.sources = list(header["sources"])
        self._rows = rows
        filters: list[Filter] = [REGISTRY.parse(options) for options in header["filters"]]
        self._filters = len(filters)
        self._sources = np.zeros(len(rows), dtype=np.int16)
        self._places = np.zeros(len(rows), dtype=np.int16)
        keys = np.zeros(len(rows), dtype=np.int64)
        for number in rows:
            row = rows[number]
            self._sources[number] = self.sources.index(row["checked"]["source"])
            self._places[number] = row["checked"]["place"]
            keys[number] = key_hash((row["row"]["id"], row["row"].get("sample", 0)))
        self.prompts = Prompts(keys)
        del keys
        self._compared: dict[int, Checked] = {}
        for place, one in enumerate(filters):
            if one.compares_responses():
                self._compare(one, place)

    def _compare(self, one: Filter, place: int) -> None:
        for index, source in enumerate(self.sources):
            if not applies(one, source, len(self.sources)):
                continue
            left = np.flatnonzero((self._sources == index) & (self._places > place))
            verdicts = one.apply(_SomeSamples(self._rows, left), FilterContext())
            for number, drop in zip(left, verdicts, strict=True):
                if drop is not None:
                    self._places[number] = place
                    self._compared[int(number)] = Checked(source, place, replace(drop, filter=one.kind))

    def reasons(self, prompt: int) -> list[Checked]:
        """Why a prompt is dropped; none if it is kept."""
        return reasons_of(map(self._checked, self.prompts.rows_of(prompt)), self.sources)

    def _checked(self, number: int) -> Checked:
        if self._places[number] == self._filters:
            return Checked(self.sources[self._sources[number]], self._filters)
        return self._compared.get(number) or Checked.of_row(self._rows[number])

    def rows(self, dropped: bool) -> Iterator[Row]:
        """The rows that are kept, or those that are dropped, with their reasons, in their order."""
        for number in self._rows:
            reasons = [one.reason() for one in self.reasons(int(self.prompts.of_row[number]))]
            if bool(reasons) == dropped:
                row = self._rows[number]["row"]
                yield {**row, "dropped": reasons} if dropped else row


def write_filtered(output: Path, header: Mapping[str, Any], rows: IndexedRows) -> tuple[int, list[Count]]:
    """Write what is kept and, beside it, what is dropped.

    Args:
        output: the rows that are kept.
        header: its header, which names sources and filters.
        rows: those of all shards.

    Returns:
        How many prompts are kept, and how many responses are dropped for each reason.
    """
    verdicts = _Verdicts(header, rows)
    write_rows(dropped_path(output), {**header, "stage": "dropped"}, verdicts.rows(dropped=True))
    write_rows(output, header, verdicts.rows(dropped=False))
    return counts_of(map(verdicts.reasons, range(len(verdicts.prompts))), verdicts.sources)


def written_counts(output: Path, prompts: int) -> tuple[int, list[Count]]:
    """The same for files that are written already."""
    path = dropped_path(output)
    header = (read_header(path) if path.exists() else None) or {}
    kinds = ["", *(one["kind"] for one in header.get("filters", ()))]
    seen: set[int] = set()

    def reasons() -> Iterator[list[Checked]]:
        for row in read_rows(path) if header else ():
            key = key_hash((row["id"], row.get("sample", 0)))
            if key not in seen:
                seen.add(key)
                yield [_checked_of(reason, kinds) for reason in row["dropped"]]

    _, counts = counts_of(reasons(), list(header.get("sources", ())))
    return prompts - len(seen), counts


def _checked_of(reason: Mapping[str, str], kinds: Sequence[str]) -> Checked:
    place = kinds.index(reason["filter"]) - 1 if reason["filter"] in kinds else -1
    return Checked(reason["source"], place, Drop(reason["reason"], reason["detail"], reason["filter"]))
