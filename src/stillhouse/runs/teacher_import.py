"""Reads log-probabilities that another program has written into the store of a run's teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from stillhouse import console
from stillhouse.core.batch import TokenBatch
from stillhouse.core.images import with_expander
from stillhouse.core.requirements import MAIN, teacher_path
from stillhouse.core.types import Prompt
from stillhouse.data import Data, TeacherReads, load_data
from stillhouse.data.collate import collate, read_by_teacher
from stillhouse.data.datasets.parse import dataset_at
from stillhouse.data.reading import SHOWN_BAD_ROWS, Reading
from stillhouse.errors import DataError, RowError
from stillhouse.models import load_tokenizer, model_reader, vocab_digest
from stillhouse.runs.config import RunConfig
from stillhouse.teachers.base import StoredTeacher
from stillhouse.teachers.imported import require_imported
from stillhouse.teachers.logprob_rows import (
    RecordedText,
    ShiftCheck,
    check_against_tokenizer,
    recorded_text,
    sparse_rows,
)
from stillhouse.teachers.read_through import content_keys
from stillhouse.teachers.store import Manifest, Record, Store
from stillhouse.teachers.store.codecs import SparseCodec

WRITTEN_AT_ONCE = 256
"""Records of one shard, before small ones are merged."""


@dataclass
class ImportAccount:
    """What an import has read and kept."""

    rows: int = 0
    kept: int = 0
    positions: int = 0
    without_label: int = 0
    """Positions that say nothing about the text's own token."""
    dropped: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    """What is wrong with the first rows that were dropped."""

    def lines(self, train: int, found: int, folder: Path) -> Iterator[str]:
        """For whoever ran it."""
        yield f"{self.rows:,} rows read, {self.kept:,} kept with {self.positions:,} positions, in {folder}"
        for reason, count in self.dropped.items():
            yield f"{count:,} dropped: {reason}"
        yield from (f"- {one}" for one in self.first)
        if self.without_label:
            yield (
                f"{self.without_label:,} positions do not name the text's own token; objectives over its "
                "log-probability, such as policy_gradient, cannot use these texts"
            )
        yield f"{found:,} of the {train:,} responses of data.train are there"


def import_logprobs(
    config: RunConfig, files: list[Path], name: str = MAIN, bad_rows: Literal["refuse", "drop"] = "refuse"
) -> list[str]:
    """Read files of log-probabilities into the store of a run's teacher of kind imported.

    Args:
        config: the run; its tokenizer and its data say what the token ids are.
        files: JSON lines, Parquet or whatever else data sets are read from.
        name: of the teacher.
        bad_rows: what happens to a row that cannot be what it says.

    Returns:
        Lines on what was read.

    Raises:
        StillhouseError: a file cannot be read, or is not what it says.
    """
    teacher = require_imported(config.all_teachers.get(name), teacher_path(name))
    tokenizer = with_expander(load_tokenizer(config.student), model_reader(config.student))
    reads = None if config.data.teacher_template is None else TeacherReads(tokenizer)
    data = load_data(config.data, tokenizer, needs=config.responses.requirements().data, teacher=reads)
    codec = teacher.store.codec(len(tokenizer))
    assert isinstance(codec, SparseCodec)
    importer = _Importer(data, tokenizer, name, teacher.k, codec)
    account, records = _read_all(importer, files, bad_rows)
    fingerprint = teacher.fingerprint(teacher.folder)
    folder = teacher.folder / f"{fingerprint}-{codec.name}"
    told = {"kind": teacher.kind, "path": teacher.name}
    with Store(folder, Manifest(codec.name, fingerprint, told, vocab_digest(tokenizer.get_vocab()))) as store:
        keys = list(records)
        for start in range(0, len(keys), WRITTEN_AT_ONCE):
            store.put({key: records[key] for key in keys[start : start + WRITTEN_AT_ONCE]})
        answered = [prompt for prompt in data.train if prompt.response_ids is not None]
        there = sum(importer.key_of(prompt) in store for prompt in answered)
    return list(account.lines(len(answered), there, folder))


def _read_all(
    importer: _Importer, files: Sequence[Path], bad_rows: Literal["refuse", "drop"]
) -> tuple[ImportAccount, dict[str, Record]]:
    """The records of all rows that can be used, by key."""
    account, shift = ImportAccount(), ShiftCheck()
    records: dict[str, Record] = {}
    title = ", ".join(map(str, files))
    with console.progress("Reading log-probabilities") as bar:
        for location, row in (one for path in files for one in dataset_at(path).raw(Reading())):
            account.rows += 1
            bar.advance(1)
            try:
                key, record, found = importer.record(row, location)
            except RowError as error:
                if bad_rows == "refuse":
                    raise DataError(
                        f"{error}. --bad-rows drop leaves out such rows and counts them"
                    ) from error
                account.dropped[error.reason] += 1
                account.first += [str(error)] if len(account.first) < SHOWN_BAD_ROWS else []
                continue
            shift.add(found)
            records[key] = record
            account.kept += 1
            account.positions += record.rows
            account.without_label += sum(one is None for one in found.own)
    if shift.shifted is not None:
        raise DataError(f"{title}: {shift.shifted}. Nothing was imported.")
    if not records:
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in account.dropped.items())
        raise DataError(f"{title}: no row is left: {reasons or 'the file is empty'}.")
    return account, records


class _Importer:
    """Makes records of rows; knows the run's rows by their ids and texts."""

    def __init__(self, data: Data, tokenizer: Any, teacher: str, k: int, codec: SparseCodec) -> None:
        self._teacher, self._k, self._codec, self._vocab = teacher, k, codec, len(tokenizer)
        self._decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
        if shown := next((prompt.id for prompt in data.train if prompt.images), None):
            raise DataError(
                f"{shown} has images, which files of log-probabilities do not tell apart. Fill the cache "
                "here (stillhouse cache build), or import those of rows without images."
            )
        self._known = {(p.token_ids, p.response_ids): p for p in data.train if p.response_ids is not None}
        self._by_text: dict[str, Prompt] = {}
        for prompt in data.train:
            for text in (prompt.question, prompt.text):
                self._by_text.setdefault(text.strip(), prompt)

    def key_of(self, prompt: Prompt) -> str:
        """The key of a prompt with its reference, as training asks for it."""
        response = prompt.reference_response()
        assert response is not None
        read = read_by_teacher(collate([response], 0), 0, self._teacher)
        return content_keys(read, in_process=False)[0]

    def record(self, row: Mapping[str, Any], location: str) -> tuple[str, Record, RecordedText]:
        """Key and record of a row.

        Raises:
            RowError: it cannot be used.
        """
        found = self._completed(recorded_text(row, location, self._vocab), row, location)
        check_against_tokenizer(found, self._decode, location)
        prompt, response = found.prompt_ids, found.response_ids
        assert prompt is not None
        assert response is not None
        known = self._known.get((prompt, response))
        trained = None if known is None else known.response_trained
        batch = TokenBatch.of([(*prompt, *response)], [len(prompt)], 0, trained=[trained])
        sparse = sparse_rows(found, self._k)
        if trained is not None:
            kept = [place for place, one in enumerate(trained) if one]
            sparse = sparse.each(lambda tensor: tensor[kept])
        record = Record(len(sparse), self._codec.encode(sparse))
        return content_keys(batch, in_process=False)[0], record, found

    def _completed(self, found: RecordedText, row: Mapping[str, Any], location: str) -> RecordedText:
        """With the ids that the file lacks, from the run's row of the same prompt."""
        if found.prompt_ids and found.response_ids:
            return found
        text = row.get("prompt")
        prompt = self._by_text.get(text.strip()) if isinstance(text, str) else None
        if prompt is None:
            problem = (
                "has no prompt_token_ids and token_ids, and its prompt is none of data.train: "
                f"{str(text)[:60]!r}"
            )
            raise RowError(location, problem, "prompts that are none of data.train")
        response = found.response_ids or prompt.response_ids
        if response is None or len(response) != len(found.positions):
            problem = (
                f"has {len(found.positions)} positions, and the response of {prompt.id} in data.train has "
                f"{len(response or ())} tokens"
            )
            raise RowError(location, problem, "lengths that do not match")
        own = found.own
        if all(one is None for one in own):
            own = tuple(entries.get(token) for token, entries in zip(response, found.positions, strict=True))
        return replace(found, prompt_ids=found.prompt_ids or prompt.token_ids, response_ids=response, own=own)


def with_known_rows(config: RunConfig, data: Data) -> Data:
    """The data without rows that a teacher is asked about, does not know, and is told to skip; counted.

    Raises:
        DataError: no row is left.
    """
    for name, teacher in config.all_teachers.items():
        if teacher.skips_rows:
            data = _known_to(config, data, name)
    return data


def _known_to(config: RunConfig, data: Data, name: str) -> Data:
    vocab = len(data.encoder.tokenizer) if data.encoder is not None else 0
    teacher = config.all_teachers[name].build(None, vocab)
    assert isinstance(teacher, StoredTeacher)
    kept = []
    for prompt in data.train:
        response = prompt.reference_response()
        asked = config.objective.teachers_of("fixed", prompt.facts.get("teacher"))
        if response is None or name not in asked:
            kept.append(prompt)
            continue
        if all(teacher.knows(read_by_teacher(collate([response], 0), 0, name))):
            kept.append(prompt)
    teacher.close()
    if len(kept) == len(data.train):
        return data
    if not kept:
        raise DataError(
            f"{teacher_path(name)}: its store has none of the {len(data.train):,} responses of data.train. "
            "Token ids of prompt and response have to be those that data.template gives; see them with "
            "stillhouse show rows."
        )
    first, *others = data.report["sets"]
    reason = f"not in the store of {teacher_path(name)}"
    dropped = {**first["dropped"], reason: len(data.train) - len(kept)}
    first = {**first, "kept": len(kept), "dropped": dropped}
    return replace(data, train=tuple(kept), report={**data.report, "sets": [first, *others]})
