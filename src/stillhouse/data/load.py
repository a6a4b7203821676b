"""The data of a run: rows are read, templated, tokenised, held to the length rules; every loss is counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from stillhouse.config import StrictConfig
from stillhouse.core.types import Prompt, Response
from stillhouse.data.lengths import TooLong, fit_response, shortened
from stillhouse.data.rows import Row
from stillhouse.data.sources import Source, SourceConfig
from stillhouse.data.templates import TEMPLATES, Auto, Encoder, Tokenizer
from stillhouse.errors import DataError

T = TypeVar("T")

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1024
_ROWS_FOR_PROGRESS = 20_000

TemplateField = TEMPLATES.field()
PositiveInt = Annotated[int, Field(ge=1)]


class DataConfig(StrictConfig):
    """What a run reads."""

    train: Source
    """The prompts to train on, with responses where the method needs them."""
    valid: Source | None = None
    """Held-out rows with responses: validation loss and the choice of the best checkpoint."""
    template: TemplateField = Auto()  # type: ignore[valid-type]
    """How a row becomes a prompt: auto, alpaca, chat, plain or custom."""
    teacher_template: TemplateField | None = None  # type: ignore[valid-type]
    """The same for a teacher with another tokenizer; default: as `template` says, by the teacher's own."""
    max_prompt: PositiveInt = 512
    """The most tokens of a prompt, template included."""
    max_response: PositiveInt = 512
    """The most tokens of a response, its end-of-sequence token included."""
    too_long: TooLong = TooLong()
    """What happens to longer ones."""
    no_response: Literal["error", "drop"] = "error"
    """What happens to a row without a response where the method needs one."""
    text: Source | None = None
    """Plain text for the language-model loss on the side."""
    text_block: Annotated[int, Field(ge=2)] = 512
    """Tokens of each piece that plain text is cut into."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """One set of prompts, and what became of its rows.

    Example: `PromptSet("valid", prompts=(p,), report={"rows": 2, "kept": 1, "dropped": {"empty prompt": 1}})`
    """

    name: str
    prompts: tuple[Prompt, ...]
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Data:
    """All data of a run.

    Example: `Data(train=(prompt,), valid=(), text=(), end_id=0, report={"sets": [...], "warnings": []})`
    """

    train: tuple[Prompt, ...]
    valid: tuple[Prompt, ...]
    text: tuple[Response, ...]
    """Blocks of plain text as responses of source "text"; the first token of a block is its prompt."""
    end_id: int
    """The token that ends a response: generation has to stop at it. For most tokenizers its eos token."""
    report: dict[str, Any] = field(default_factory=dict)
    """What the run folder's data.json holds: rows, kept, dropped, truncated, digests."""
    encoder: Encoder | None = None
    """Template and tokenizer of the prompts, and the teacher's where that is another one."""


def load(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    needs_response: bool = False,
    teacher_tokenizer: Tokenizer | None = None,
) -> Data:
    """Read everything that `config` names.

    Args:
        config: the `data` part of a run.
        tokenizer: the student's tokenizer.
        needs_response: whether each training prompt must have a response (fixed responses) or not.
        teacher_tokenizer: the teacher's, where it is another one; prompts then hold its ids too.

    Raises:
        DataError: a file is missing or broken, a row cannot be used, or nothing is left.
    """
    encoder = Encoder(config.template, tokenizer, _teacher(config, teacher_tokenizer))
    train = load_prompts("train", config.train, config, encoder, needs_response=needs_response)
    sets = [train]
    if config.valid is not None:
        sets.append(load_prompts("valid", config.valid, config, encoder, needs_response=True))
    valid = sets[1].prompts if config.valid is not None else ()
    reports = [one.report for one in sets]
    warnings = [warning for one in sets for warning in losses(one)]
    if config.valid is not None:
        warnings += overlap(train.prompts, sets[1])
    for warning in warnings:
        log.warning(warning)
    text: tuple[Response, ...] = ()
    if config.text is not None:
        text, about = load_text(config.text, config.text_block, encoder)
        reports.append(about)
    report = {"template": encoder.template.model_dump(), "sets": reports, "warnings": warnings}
    if encoder.teacher is not None:
        report["teacher_template"] = encoder.teacher.template.model_dump()
    return Data(train.prompts, valid, text, encoder.end_id, report, encoder)


def load_prompts(
    name: str, source: SourceConfig, config: DataConfig, encoder: Encoder, *, needs_response: bool = False
) -> PromptSet:
    """Read one set of prompts with the template and the length rules of `config`; also used for evaluation.

    Args:
        name: the beginning of the prompts' ids: "train" gives "train:1", and "train:1:2" for the second
            output of the first row.
        source: where the rows are.
        config: its `too_long`, `max_prompt`, `max_response` and `no_response` hold for every set.
        encoder: template and tokenizer.
        needs_response: refuse (or drop, as `no_response` says) rows without a response.

    Raises:
        DataError: see `load`.
    """
    counts: Counter[str] = Counter()
    reader = _Reader(name, source, config, encoder, needs_response)
    rows = reader.expanded(_shown(source.rows(counts), name))
    for chunk in _chunks(rows, _ROWS_AT_ONCE):
        reader.read(chunk)
    reader.refuse_missing()
    if counts["broken"]:
        reader.dropped["broken line"] = counts["broken"]
    prompts = reader.prompts
    answers = [prompt.response_ids for prompt in prompts if prompt.response_ids is not None]
    report = {
        "name": name,
        "path": source.path,
        "sha256": source.fingerprint(),
        "rows": counts["rows"] + counts["broken"],
        "kept": len(prompts),
        "dropped": dict(reader.dropped),
        "truncated": dict(reader.truncated),
        "with_response": len(answers),
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
        "response_tokens": sum(len(ids) for ids in answers),
    }
    if not prompts:
        losses = ", ".join(f"{count} x {reason}" for reason, count in reader.dropped.items())
        raise DataError(
            f"{source.path}: no row is left for data.{name}: {report['rows']} rows read; {losses or 'empty'}"
        )
    return PromptSet(name, tuple(prompts), report)


def read_rows(
    rows: Iterable[tuple[str, Row]],
    source: SourceConfig,
    config: DataConfig,
    encoder: Encoder,
    limit: int | None = None,
) -> tuple[list[Prompt], Counter[str], Counter[str]]:
    """Prompts from rows that were read elsewhere, with the length rules of `config`.

    Args:
        rows: each with the id of its prompt; a response is not needed.
        source: where they are from.
        config: its `too_long`, `max_prompt` and `max_response` hold.
        encoder: template and tokenizer.
        limit: at most this many prompts.

    Returns:
        The prompts; what was dropped, by reason; what was cut.
    """
    reader = _Reader("eval", source, config, encoder, needs_response=False)
    for chunk in _chunks(rows, min(limit or _ROWS_AT_ONCE, _ROWS_AT_ONCE)):
        reader.read(chunk)
        if limit is not None and len(reader.prompts) >= limit:
            break
    return reader.prompts[:limit], reader.dropped, reader.truncated


class _Reader:
    """Turns the rows of one set into prompts and keeps count of what is lost."""

    def __init__(
        self, name: str, source: SourceConfig, config: DataConfig, encoder: Encoder, needs_response: bool
    ) -> None:
        self.name = name
        self.source = source
        self.config = config
        self.encoder = encoder
        self.needs_response = needs_response
        self.prompts: list[Prompt] = []
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self.missing: list[str] = []

    def expanded(self, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
        """Each row with the id of its prompt; with `each_output` one for every output."""
        for number, row in enumerate(rows, start=1):
            if row.text is not None:
                raise DataError(
                    f"{row.where}: holds plain text, no prompt. Give the file as data.text, or name the "
                    f"field with the prompt: data.{self.name}.fields.prompt"
                )
            if not self.source.each_output:
                yield f"{self.name}:{number}", row
                continue
            for index, one in enumerate(row.each(), start=1):
                yield f"{self.name}:{number}" + (f":{index}" if index > 1 else ""), one

    def read(self, chunk: Sequence[tuple[str, Row]]) -> None:
        """Tokenise some rows and keep those that can be used."""
        usable = [(id, row) for id, row in chunk if self._usable(row)]
        encoded = self.encoder.encode([row for _, row in usable])
        for (id, row), (text, prompt_ids, response_ids) in zip(usable, encoded, strict=True):
            prompt = self._fitted(id, row, text, prompt_ids, response_ids)
            if prompt is not None:
                self.prompts.append(prompt)

    def _usable(self, row: Row) -> bool:
        if not row.asked().strip():
            self.dropped["empty prompt"] += 1
            return False
        if row.response is not None or not self.needs_response:
            return True
        labelled = self.source.labelled
        if labelled is not None:
            self.dropped["unlabelled"] += 1
        elif self.config.no_response == "drop":
            self.dropped["no response"] += 1
        else:
            self.missing.append(row.where)
        return False

    def _fitted(
        self, id: str, row: Row, text: str, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...] | None
    ) -> Prompt | None:
        config = self.config
        if not prompt_ids:
            self.dropped["empty prompt"] += 1
            return None
        if len(prompt_ids) > config.max_prompt:
            rule = config.too_long.prompt
            cut = None if rule == "drop" else shortened(row, self.encoder, config.max_prompt, rule)
            if cut is None:
                self.dropped["prompt too long"] += 1
                return None
            self.truncated["prompt"] += 1
            row, text, prompt_ids = cut
        fitted = response_ids
        if response_ids is not None:
            cutting = config.too_long.response
            fitted = fit_response(response_ids, config.max_response, cutting, self.truncated)
            if fitted is None:
                self.dropped["response too long"] += 1
                return None
        theirs = self.encoder.teacher_ids(row)
        if theirs is not None and not theirs:
            self.dropped["empty prompt"] += 1
            return None
        return Prompt(
            id,
            prompt_ids,
            text,
            fitted,
            fitted == response_ids,
            row.references,
            teacher_ids=theirs,
            asked=row.question(),
            facts=row.facts,
        )

    def refuse_missing(self) -> None:
        """Name the rows without a response, if the method needs one and the config does not drop them."""
        if not self.missing:
            return
        first = ", ".join(self.missing[:3])
        more = f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else ""
        place = "evaluate.data" if self.name == "eval" else f"data.{self.name}"
        way_out = ", or choose a method whose responses are generated" if self.name == "train" else ""
        raise DataError(
            f"{first}{more}: no response, but {place} needs one in each row here. "
            f"Add them, or set data.no_response: drop{way_out}"
        )


def load_text(
    source: SourceConfig, block: int, encoder: Encoder
) -> tuple[tuple[Response, ...], dict[str, Any]]:
    """Plain text as blocks of exactly `block` tokens; documents are separated by the end token.

    What is left at the end is dropped and counted. The first token of a block is its prompt, because nothing
    before it is there to predict it from.

    Raises:
        DataError: there is less than one block of text.
    """
    counts: Counter[str] = Counter()
    stream: list[int] = []
    for chunk in _chunks(source.rows(counts), 64):
        for row, ids in zip(chunk, encoder.text_ids([_plain(row) for row in chunk]), strict=True):
            if not ids:
                raise DataError(f"{row.where}: holds no text")
            stream.extend((*ids, encoder.end_id))
    starts = range(0, len(stream) - block + 1, block)
    blocks = tuple(
        _block(index, stream[start : start + block], encoder.end_id) for index, start in enumerate(starts)
    )
    if not blocks:
        raise DataError(
            f"{source.path}: {len(stream)} tokens of text are less than one block; "
            f"set data.text_block below {block} or give more text"
        )
    dropped = len(stream) - block * len(blocks)
    return blocks, {
        "name": "text",
        "path": source.path,
        "sha256": source.fingerprint(),
        "rows": counts["rows"] + counts["broken"],
        "kept": len(blocks),
        "dropped": {"tokens after the last block": dropped},
        "truncated": {},
        "with_response": len(blocks),
    }


def _block(index: int, ids: list[int], end_id: int) -> Response:
    prompt = Prompt(f"text:{index + 1}", (ids[0],), "")
    return Response(prompt, tuple(ids[1:]), "text", finished=ids[-1] == end_id)


def _plain(row: Row) -> str:
    if row.text is not None:
        return row.text
    raise DataError(f"{row.where}: has no field text; name it: data.text.fields: {{text: ...}}")


def _teacher(config: DataConfig, tokenizer: Tokenizer | None) -> Encoder | None:
    """The teacher's template and tokenizer; None if it has the student's."""
    return None if tokenizer is None else Encoder(config.teacher_template or config.template, tokenizer)


def _shown(rows: Iterable[Row], name: str) -> Iterator[Row]:
    """The same rows, with a line on the terminal while a large set is read."""
    iterator = iter(rows)
    start = list(islice(iterator, _ROWS_FOR_PROGRESS))
    yield from start
    if len(start) < _ROWS_FOR_PROGRESS:
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(iterator, f"reading data.{name}", console=console, disable=not console.is_terminal)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def overlap(train: Sequence[Prompt], other: PromptSet) -> list[str]:
    """A warning if prompts of `other` are training prompts too (equal token for token)."""
    seen = {prompt.token_ids for prompt in train}
    both = sum(prompt.token_ids in seen for prompt in other.prompts)
    if not both:
        return []
    other.report["also_in_train"] = both
    return [
        f"{both} of {len(other.prompts)} prompts of data.{other.name} ({other.report['path']}) are also in "
        "data.train: what is measured on them says little about new prompts"
    ]


def losses(one: PromptSet) -> list[str]:
    """A warning if more than a tenth of the rows could not be used as they are."""
    report = one.report
    lost = {key: count for key, count in report["dropped"].items() if key != "unlabelled"}
    lost |= {f"{key} cut": count for key, count in report["truncated"].items()}
    if sum(lost.values()) * 10 <= report["rows"]:
        return []
    told = ", ".join(f"{count} x {reason}" for reason, count in lost.items())
    return [
        f"data.{one.name} ({report['path']}): of {report['rows']} rows {told}. "
        "See data.max_prompt, data.max_response and data.too_long"
    ]
