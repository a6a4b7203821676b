"""The data of a run: rows are read, rendered, tokenised and held to the length rules; drops are counted."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from stillhouse.core.types import Prompt, Response
from stillhouse.data.account import Account
from stillhouse.data.chunks import ChunkEncoder, chunked
from stillhouse.data.config import DataConfig
from stillhouse.data.datasets import DatasetConfig
from stillhouse.data.large_sets import ImagesFoundError, tokenised
from stillhouse.data.prompt_builder import REJECTED, RESPONSES, PromptBuilder, check_responses, path_of
from stillhouse.data.reading import Reading
from stillhouse.data.rows import Row
from stillhouse.data.stored_prompts import renumbered
from stillhouse.data.teacher_prompts import TeacherReads, TemplatePair, teacher_encoder
from stillhouse.data.templates import Tokenizer, settled_template
from stillhouse.data.tokenise import Encoder
from stillhouse.errors import DataError

T = TypeVar("T")

log = logging.getLogger(__name__)

_BATCH_ROWS = 1024
"""Rows that are tokenised in one call."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A tokenised dataset, and a report on its rows.

    Example: `PromptSet("valid", prompts=(p,), report={"rows": 2, "kept": 1, "dropped": {"empty prompt": 1}})`
    """

    name: str
    prompts: Sequence[Prompt]
    """A tuple; of very many prompts, those on disk."""
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Data:
    """All tokenised data of a run.

    Example: `Data(train=(prompt,), valid=(), text=(), end_id=0, report={"sets": [...], "warnings": []})`
    """

    train: Sequence[Prompt]
    valid: Sequence[Prompt]
    text: tuple[Response, ...]
    """Blocks of plain text as responses of source "text"; the prompt of a block is its first token."""
    end_id: int
    """The stop token of responses; for most tokenizers the end-of-sequence token."""
    report: dict[str, Any] = field(default_factory=dict)
    """The content of data.json in the run folder: rows, kept, dropped, truncated, digests."""
    encoder: Encoder | None = None
    """The encoder of the prompts."""


def load_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    needs: Collection[str] = (),
    teacher: TeacherReads | None = None,
) -> Data:
    """Read and tokenise every dataset in `config`.

    Args:
        config: the `data` section of a run.
        tokenizer: the student's tokenizer.
        needs: what each row of `data.train` must have: `Requirements.data`.
        teacher: what the teacher's own prompts depend on; None: there is no teacher.

    Raises:
        DataError: a file is missing or broken, a row cannot be used, or no row is left.
    """
    encoder = encoder_of(config, tokenizer, teacher)
    load = partial(load_prompts, config=config, encoder=encoder, teacher=teacher)
    train = load("train", config.train, needs=needs)
    sets = [train]
    if config.valid is not None:
        sets.append(load("valid", config.valid, needs={RESPONSES}))
    valid = sets[1].prompts if config.valid is not None else ()
    reports = [one.report for one in sets]
    warnings = [warning for one in sets for warning in set_warnings(one)]
    if train.report.get("pairs") and REJECTED not in needs:
        warnings.append(_unused_pairs(train.report))
    if config.train_on == "all":
        warnings.append(
            "data.train_on: all: a prompt ends before the first answer that is trained on; responses that a "
            "model generates answer there"
        )
    if config.valid is not None:
        warnings += _overlap_warnings(train.prompts, sets[1])
    for warning in warnings:
        log.warning(warning)
    text: tuple[Response, ...] = ()
    if config.text is not None:
        text, text_report = load_text(config.text, config.text_block, encoder, config.reading())
        reports.append(text_report)
    report = {"template": encoder.template.model_dump(), "sets": reports, "warnings": warnings}
    if encoder.teacher is not None and not encoder.teacher.differs_in_images:
        report["teacher_template"] = encoder.teacher.template.model_dump()
    return Data(train.prompts, valid, text, encoder.end_id, report, encoder)


def load_prompts(
    name: str,
    dataset: DatasetConfig,
    config: DataConfig,
    encoder: Encoder,
    *,
    needs: Collection[str] = (),
    teacher: TeacherReads | None = None,
) -> PromptSet:
    """Read and tokenise one dataset with the length rules of `config`.

    Args:
        name: the prefix of the prompt ids: "train" gives "train:1", and "train:1:2" for the second output of
            the first row.
        dataset: what to read.
        config: `too_long`, `max_prompt`, `max_response` and `no_response` apply.
        encoder: template and tokenizer.
        needs: what each row must have: a response, as a preference pair a rejected one too, reasoning before
            its answer. Rows without are treated as `no_response` says.
        teacher: rows that it cannot read are dropped; None: there is none.

    Raises:
        DataError: see `load_data`.
    """
    work = ChunkEncoder(name, dataset, config, encoder, needs, teacher)
    prompts, account = _tokenised(work)
    check_responses(name, account.without_response, needs)
    reading = account.restore(config.reading())
    if not prompts:
        raise _nothing_left(name, dataset, account)
    log.info("%s (%s): %s", path_of(name), dataset.title, reading.format_line())
    return PromptSet(name, prompts, _report(work, account, reading, len(prompts)))


def _tokenised(work: ChunkEncoder) -> tuple[Sequence[Prompt], Account]:
    """The prompts of a large dataset on disk, those of others and those with images in memory."""
    if work.dataset.is_large() and not work.begins_with_images():
        with contextlib.suppress(ImagesFoundError):
            return tokenised(work)
    return _at_once(work)


def _at_once(work: ChunkEncoder) -> tuple[tuple[Prompt, ...], Account]:
    """The prompts of a small dataset, in memory."""
    prompts: list[Prompt] = []
    account = Account()
    for chunk in chunked(work.dataset.found_rows()):
        found, counts = work(chunk)
        prompts += renumbered(found, work.name, account.numbered)
        account.add(counts)
    return tuple(prompts), account


def _report(work: ChunkEncoder, account: Account, reading: Reading, kept: int) -> dict[str, Any]:
    """What became of the rows of a dataset, for data.json."""
    dataset = work.dataset
    return {
        "name": work.name,
        "path": dataset.title,
        "sha256": dataset.fingerprint(),
        "rows": account.rows,
        "kept": kept,
        "dropped": account.all_dropped,
        "truncated": dict(account.truncated),
        "with_response": account.with_response,
        "prompt_tokens": account.prompt_tokens,
        "response_tokens": account.response_tokens,
        **({"pairs": account.pairs} if account.pairs else {}),
        **({"rejected_tokens": account.rejected_tokens} if account.rejected_tokens else {}),
        **reading.report(),
        **_sources(dataset, account),
        "turns": dict(account.turns),
        **({"teachers": dict(account.teachers)} if account.teachers else {}),
        "notes": dict(account.notes),
    }


def _sources(dataset: DatasetConfig, account: Account) -> dict[str, Any]:
    """Of several mixed datasets what came of each."""
    parts = dataset.parts()
    if parts[0] is dataset:
        return {}
    return {
        "sources": [
            {
                "path": part.title,
                "weight": part.weight,
                "sha256": part.fingerprint(),
                "rows": account.read_by_part[str(number)],
                "kept": account.kept_by_part[str(number)],
            }
            for number, part in enumerate(parts)
        ]
    }


def _nothing_left(name: str, dataset: DatasetConfig, account: Account) -> DataError:
    dropped = ", ".join(f"{count} x {reason}" for reason, count in account.all_dropped.items()) or "empty"
    first = "".join(f"\n- {problem}" for problem in account.first_unread)
    where = f"{dataset.title}: no row is left for {path_of(name)}"
    return DataError(f"{where}: {account.rows} rows read; {dropped}{first}")


def encode_rows(
    rows: Iterable[tuple[str, Row]],
    dataset: DatasetConfig,
    config: DataConfig,
    encoder: Encoder,
    limit: int | None = None,
    needs: Collection[str] = (),
) -> tuple[list[Prompt], Counter[str], Counter[str]]:
    """Tokenise evaluation rows with the length rules of `config`; they need no response.

    Args:
        rows: (id of the prompt, row).
        dataset: what they were read from.
        config: `too_long`, `max_prompt` and `max_response` apply.
        encoder: template and tokenizer.
        limit: maximum number of prompts.
        needs: rows that are not what is needed are treated as `no_response` says; see `load_prompts`.

    Returns:
        The prompts; the numbers of dropped rows by reason; the numbers of truncated prompts and responses.
    """
    reading = config.reading()
    builder = PromptBuilder("eval", dataset, config, encoder, reading=reading, needs=needs)
    for chunk in _chunks(rows, min(limit or _BATCH_ROWS, _BATCH_ROWS)):
        builder.add(chunk)
        if limit is not None and len(builder.prompts) >= limit:
            break
    return builder.prompts[:limit], builder.dropped + reading.dropped, builder.truncated


def load_text(
    dataset: DatasetConfig, block: int, encoder: Encoder, reading: Reading
) -> tuple[tuple[Response, ...], dict[str, Any]]:
    """Plain text packed into blocks of exactly `block` tokens; documents are separated by the end token.

    The tokens after the last block are dropped and counted. The first token of a block is its prompt, because
    nothing predicts it.

    Returns:
        The blocks, and a report on the dataset.

    Raises:
        DataError: the text is shorter than one block.
    """
    stream: list[int] = []
    for chunk in _chunks(dataset.rows(reading), 64):
        for row, ids in zip(chunk, encoder.text_ids([_text_of(row) for row in chunk]), strict=True):
            if not ids:
                raise DataError(f"{row.location}: holds no text")
            stream.extend((*ids, encoder.end_id))
    starts = range(0, len(stream) - block + 1, block)
    blocks = tuple(
        _block(index, stream[start : start + block], encoder.end_id) for index, start in enumerate(starts)
    )
    if not blocks:
        raise DataError(
            f"{dataset.title}: {len(stream)} tokens of text are less than one block; "
            f"set data.text_block below {block} or give more text"
        )
    dropped = len(stream) - block * len(blocks)
    return blocks, {
        "name": "text",
        "path": dataset.title,
        "sha256": dataset.fingerprint(),
        "rows": reading.rows,
        "kept": len(blocks),
        "dropped": {"tokens after the last block": dropped, **reading.dropped},
        "truncated": {},
        "with_response": len(blocks),
    }


def _block(index: int, ids: list[int], end_id: int) -> Response:
    prompt = Prompt(f"text:{index + 1}", (ids[0],), "")
    return Response(prompt, tuple(ids[1:]), "text", finished=ids[-1] == end_id)


def _text_of(row: Row) -> str:
    if row.text is not None:
        return row.text
    raise DataError(f"{row.location}: has no field text; name it: data.text.fields: {{text: ...}}")


def encoder_of(config: DataConfig, tokenizer: Tokenizer, teacher: TeacherReads | None) -> Encoder:
    """The student's encoder, with the teacher's where that reads prompts of its own.

    Raises:
        DataError: several answers are to be trained on, which a teacher with another tokenizer cannot read.
    """
    if config.train_on == "all" and teacher is not None and teacher.other_vocabulary:
        raise DataError(
            "data.train_on: all needs a teacher with the student's tokenizer, because the turns between the "
            "answers are written with the student's control tokens; use data.train_on: last"
        )
    template = settled_template(config.template, tokenizer, lambda: config.train.rows(config.reading()))
    pair = TemplatePair(config.template, config.teacher_template)
    theirs = teacher_encoder(template, pair, tokenizer, teacher)
    return Encoder(template, tokenizer, theirs, config.train_on)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _overlap_warnings(train: Sequence[Prompt], other: PromptSet) -> list[str]:
    """A warning if training prompts are in `other` too, equal token for token."""
    asked = {prompt.content for prompt in other.prompts}
    seen = {prompt.content for prompt in train if prompt.content in asked}
    both = sum(prompt.content in seen for prompt in other.prompts)
    if not both:
        return []
    other.report["also_in_train"] = both
    return [
        f"{both} of {len(other.prompts)} prompts of data.{other.name} ({other.report['path']}) are also in "
        "data.train: what is measured on them says little about new prompts"
    ]


def set_warnings(one: PromptSet) -> list[str]:
    """What a user should know of how the rows of a set were read."""
    return [*_dropped_warnings(one), *_notes(one)]


def _unused_pairs(report: dict[str, Any]) -> str:
    """What is read of preference pairs where a run does not ask for them."""
    return (
        f"data.{report['name']} ({report['path']}): {report['pairs']} of {report['kept']} rows are "
        "preference pairs; the chosen response is the row's response, the rejected one is not used. Both are "
        "with responses: {kind: preference_pairs}"
    )


def _notes(one: PromptSet) -> list[str]:
    """What happened to rows on their way to the tokenizer, once for each kind."""
    return [
        f"{path_of(one.name)} ({one.report['path']}): in {count} of {one.report['rows']} rows {note}"
        for note, count in one.report["notes"].items()
    ]


def _dropped_warnings(one: PromptSet) -> list[str]:
    """What was dropped or truncated, however few rows, and which fields nothing uses."""
    report = one.report
    lost = {key: count for key, count in report["dropped"].items() if key != "unlabelled"}
    lost |= {f"{key} cut": count for key, count in report["truncated"].items()}
    told = []
    if lost:
        summary = ", ".join(f"{count} x {reason}" for reason, count in lost.items())
        told.append(f"of {report['rows']} rows {summary}{_where_to_look(lost, report.get('bad_rows', []))}")
    if report.get("unused"):
        told.append(report["unused"])
    return [f"{path_of(one.name)} ({report['path']}): {text}" for text in told]


def _where_to_look(lost: Iterable[str], bad_rows: Sequence[str]) -> str:
    first = "; the first bad rows: " + "; ".join(bad_rows) if bad_rows else ""
    by_length = any(reason.startswith(("prompt", "response")) for reason in lost)
    return first + (". See data.max_prompt, data.max_response and data.too_long" if by_length else "")
