"""The responses in files, by source: found through an index and read when they are asked for."""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.core.stage_tables import table_header
from stillhouse.data.datasets import dataset_at
from stillhouse.data.images import image_references
from stillhouse.data.reading import Reading
from stillhouse.errors import DataError
from stillhouse.files import STAGE, shards_beside
from stillhouse.rollouts.offline.indexed_rows import OpenFiles, Row
from stillhouse.rollouts.offline.reading import round_files
from stillhouse.rollouts.offline.samples import Sample, SampleKey, SamplesDigest, SamplesOnDisk
from stillhouse.rollouts.offline.stage_files import located_rows, read_header, read_rows
from stillhouse.urls import is_remote


class StoredSamples(SamplesOnDisk):
    """The samples of one source in files, in order.

    In memory are 19 bytes of each: where it is, a hash of its key, and whether it still needs a score.

    Example: `read_samples([Path("teacher.jsonl")])["teacher"][17].text`
    """

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._file, self._offset, self._key, self._unscored = array("H"), array("q"), array("q"), array("b")
        self._digest = SamplesDigest()
        self.without_tokens: str | None = None
        """The prompt of the first response that has no score and cannot get one."""
        self.largest_token: tuple[int, str] = (0, "")
        """The largest token id in samples without a score, and their prompt."""

    def add(self, sample: Sample, file: int, offset: int) -> None:
        """Add the sample of the line that begins at an offset."""
        self._digest.add(sample)
        self._file.append(file)
        self._offset.append(offset)
        self._key.append(key_hash(sample.key))
        unscored = "teacher" not in sample.scores and not sample.missing
        self._unscored.append(unscored)
        if unscored:
            response, prompt = sample.response, sample.response.prompt
            if response.token_ids and prompt.token_ids:
                largest = max(*prompt.token_ids, *response.token_ids)
                self.largest_token = max(self.largest_token, (largest, prompt.id))
            else:
                self.without_tokens = self.without_tokens or prompt.id

    @property
    def digest(self) -> str:
        """See `samples_digest`."""
        return self._digest.hexdigest()

    @property
    def keys_hashed(self) -> NDArray[np.int64]:
        """The hash of each sample's key."""
        return np.array(self._key, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(len(one) * one.itemsize for one in (self._file, self._offset, self._key, self._unscored))

    @property
    def unscored(self) -> int:
        """How many have no score of the teacher's yet."""
        return sum(self._unscored)

    def check_keys(self, source: str) -> None:
        """Refuse two samples of the same number to one prompt.

        Raises:
            DataError: there are two.
        """
        keys = self.keys_hashed
        ordered = np.sort(keys)
        if not (ordered[1:] == ordered[:-1]).any():
            return
        del ordered
        found, first, counts = np.unique(keys, return_index=True, return_counts=True)
        for key, place, count in zip(found[counts > 1], first[counts > 1], counts[counts > 1], strict=True):
            if len({self[int(one)].key for one in np.flatnonzero(keys == key)}) < count:
                prompt = self[int(place)].key[0]
                raise DataError(f"prompt {prompt}: {count} responses of the same number from the {source}")

    def __len__(self) -> int:
        return len(self._offset)

    def read(self, place: int) -> Sample:
        """See the base class."""
        return Sample.from_row(self._files.read(self._file[place], self._offset[place])[1])


def key_hash(key: SampleKey) -> int:
    """Eight bytes of a key."""
    digest = hashlib.blake2b(f"{key[0]}\0{key[1]}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def read_samples(paths: Sequence[Path]) -> dict[str, StoredSamples]:
    """The samples of files, by source; of a run folder, those of its newest round.

    Raises:
        DataError: there are none, or a source has the same sample of a prompt twice.
    """
    files: list[Path] = []
    for path in paths:
        files += [found[0] for found in round_files(path)[1].values()] if path.is_dir() else [path]
    opened = OpenFiles()
    by_source: dict[str, StoredSamples] = {}
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: no such file or run folder{_shards_hint(path)}")
        number, rows = _located_rows(path, opened)
        for offset, row in rows:
            sample = Sample.from_row(row)
            found = by_source.setdefault(sample.response.source, StoredSamples(opened))
            found.add(sample, number, offset)
    for name, samples in by_source.items():
        samples.check_keys(name)
    if not by_source:
        raise DataError(f"{', '.join(map(str, paths))}: contain no rows")
    return by_source


def _shards_hint(path: Path) -> str:
    if not shards_beside(path):
        return ""
    return f", but shards of it, which may be unfinished; join them with: stillhouse merge {path}"


def _located_rows(path: Path, opened: OpenFiles) -> tuple[int, Iterator[tuple[int, Row]]]:
    """The number of a file among those that are open, and its rows, each with the offset of its line."""
    dataset = dataset_at(path)
    rows: Iterable[Row] | None = None
    if path.suffix == ".jsonl":
        with path.open("rb") as handle:
            first = handle.readline()
        if f'"{STAGE}"'.encode() in first and read_header(path) is not None:
            if not is_remote(path):
                return opened.add(path), located_rows(path)
            rows = read_rows(path)
    elif path.suffix == ".parquet" and table_header(path) is not None:
        rows = read_rows(path)
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the samples
    if rows is None:
        rows = _plain_rows(path, dataset.rows(Reading()))
    return opened.add(path, spool), _spooled(rows, spool)


def _spooled(rows: Iterable[Row], spool: IO[bytes]) -> Iterator[tuple[int, Row]]:
    """The rows, each written to where it can be read again."""
    offset = 0
    for row in rows:
        line = (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()
        spool.seek(offset)
        spool.write(line)
        yield offset, json.loads(line)
        offset += len(line)


def _plain_rows(path: Path, rows: Iterable[Any]) -> Iterator[Row]:
    """The rows of data that are no stage file, as those of one."""
    for number, row in enumerate(rows):
        if not row.has_response:
            raise DataError(f"{row.location}: has no response to filter")
        yield {
            "number": number,
            "id": f"{path.stem}:{number + 1}",
            "by": "data",
            **row.prompt_fields(),
            **({"images": image_references(row)} if row.image_values else {}),
            "response": row.references[0] if row.references else row.response,
            "references": list(row.references),
            "facts": dict(row.extra),
        }


def samples_by_prompt(paths: Sequence[Path]) -> tuple[list[Sample], list[list[Sample]]]:
    """All responses of some files, and those to the same prompt together.

    Raises:
        DataError: a file cannot be read.
    """
    groups: dict[str, list[Sample]] = {}
    samples = [one for found in read_samples(paths).values() for one in found if not one.missing]
    for sample in map(_without_itself, samples):
        groups.setdefault(_question(sample), []).append(sample)
    return samples, list(groups.values())


def _without_itself(sample: Sample) -> Sample:
    """A response of a plain data file is no reference to be ranked by."""
    response = sample.response
    if sample.by != "data":
        return sample
    prompt = replace(response.prompt, references=())
    return replace(sample, response=replace(response, prompt=prompt))


def _question(sample: Sample) -> str:
    """What responses to the same prompt have in common, whatever file and row they are from."""
    prompt = sample.response.prompt
    return json.dumps(prompt.as_fields(), sort_keys=True, default=str)
