"""The data of a run: rows are read, rendered, tokenised and held to the length rules; drops are counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from stillhouse.config import ListOf, StrictConfig
from stillhouse.core.requirements import MAIN
from stillhouse.core.types import Prompt, Response
from stillhouse.data.chat import TrainOn
from stillhouse.data.conversation import without_chain
from stillhouse.data.datasets import DatasetConfig, DatasetField
from stillhouse.data.reading import BadRows, Reading
from stillhouse.data.row_teachers import RowTeacher, rows_by_teacher
from stillhouse.data.rows import Row
from stillhouse.data.teacher_context import NO_ROW_BEFORE, TeacherContexts, in_context
from stillhouse.data.teacher_prompts import TeacherReads, TemplatePair, teacher_encoder
from stillhouse.data.templates import TEMPLATES, Auto, Tokenizer, settled_template
from stillhouse.data.tokenise import (
    UNSPELLABLE,
    EncodedRow,
    Encoder,
    TooLong,
    truncate_prompt,
    truncate_response,
)
from stillhouse.errors import DataError, RowError

T = TypeVar("T")

log = logging.getLogger(__name__)

RESPONSES, REJECTED, REASONING = "responses", "rejected", "reasoning"
"""What rows must have, as `Requirements.data` has it."""

_BATCH_ROWS = 1024
"""Rows that are tokenised in one call."""

_PROGRESS_ROWS = 20_000
"""Rows from which on reading shows progress."""

TemplateField = TEMPLATES.field()
PositiveInt = Annotated[int, Field(ge=1)]


class DataConfig(StrictConfig):
    """The datasets of a run, and how their rows become prompts."""

    train: DatasetField
    """Training prompts, with responses if the method needs them."""
    valid: DatasetField | None = None
    """Held-out rows with responses, for the validation loss and the choice of the best checkpoint."""
    template: TemplateField = Auto()  # type: ignore[valid-type]
    """Renders a row as a prompt: auto, alpaca, chat, plain or custom."""
    teacher_template: TemplateField | None = None  # type: ignore[valid-type]
    """The template of the teacher's prompts. Default: with `template: auto` or `chat` the chat template of
    the teacher's own tokenizer, where it has one; otherwise the student's prompts. A teacher with another
    vocabulary reads `template` with its own tokenizer."""
    teacher_context: TeacherContexts = Field(default_factory=dict)
    """What a teacher reads in the place of the prompt's text in rows of data.train, where it is to know more
    than the student, by the teacher's name (a text alone is that of `main`): a format string with `{prompt}`,
    `{response}`, `{reasoning}`, any other column of the row, and `{other_prompt}` and `{other_response}` of
    the row before it."""
    train_on: TrainOn = "last"
    """Which turns of the assistant are trained on: the last of a conversation, or all. With `all` the prompt
    ends before the first of them, also where responses are generated; what users and tools say between them
    is read and not trained on. A turn of `weight` 0 is never trained on."""
    max_prompt: PositiveInt = 512
    """Maximum number of tokens of a prompt, template included."""
    max_response: PositiveInt = 512
    """Maximum number of tokens of a response, its end-of-sequence token included."""
    too_long: TooLong = TooLong()
    """What happens to longer rows."""
    no_response: Literal["error", "drop"] = "error"
    """What happens to a row without a response if the method needs one, or one that is no preference pair if
    the method needs pairs."""
    bad_rows: BadRows = "refuse"
    """What happens to a row that cannot be read or rendered: `refuse` stops and names it, `drop` leaves it
    out and counts it by its reason."""
    row_teacher: RowTeacher | None = None
    """Which of several teachers a training row is for, by the value of a column; None: by its column
    `teacher`."""
    ignore: ListOf[str] = ()
    """Fields of rows that are read as if they were not there; nothing is said about them."""
    text: DatasetField | None = None
    """Plain text for an additional language-model loss."""
    text_block: Annotated[int, Field(ge=2)] = 512
    """Number of tokens of each block that plain text is split into."""

    def reading(self) -> Reading:
        """How datasets are read, with an account that is still empty."""
        return Reading(
            self.bad_rows,
            self.ignore,
            "Mend the row, or leave out such rows and count them: data.bad_rows: drop",
            used=() if self.row_teacher is None else (self.row_teacher.column,),
        )


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A tokenised dataset, and a report on its rows.

    Example: `PromptSet("valid", prompts=(p,), report={"rows": 2, "kept": 1, "dropped": {"empty prompt": 1}})`
    """

    name: str
    prompts: tuple[Prompt, ...]
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Data:
    """All tokenised data of a run.

    Example: `Data(train=(prompt,), valid=(), text=(), end_id=0, report={"sets": [...], "warnings": []})`
    """

    train: tuple[Prompt, ...]
    valid: tuple[Prompt, ...]
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
    if encoder.teacher is not None:
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
    reading = config.reading()
    builder = PromptBuilder(
        name,
        dataset,
        config,
        encoder,
        reading=reading,
        needs=needs,
        teacher=teacher,
    )
    rows = builder.with_ids(_with_progress(dataset.rows(reading), name))
    for chunk in _chunks(rows, _BATCH_ROWS):
        builder.add(chunk)
    builder.check_responses()
    builder.dropped.update(reading.dropped)
    prompts = builder.prompts
    if not prompts:
        raise _nothing_left(builder)
    for number, source in enumerate(reading.sources):
        source["kept"] = sum(builder.source_of[prompt.id] == number for prompt in prompts)
    log.info("%s (%s): %s", _path_of(name), dataset.title, reading.format_line())
    return PromptSet(name, tuple(prompts), _report(builder))


def _report(builder: PromptBuilder) -> dict[str, Any]:
    """What became of the rows of a dataset, for data.json."""
    reading, dataset = builder.reading, builder.dataset
    return {
        "name": builder.name,
        "path": dataset.title,
        "sha256": dataset.fingerprint(),
        "rows": reading.rows,
        "kept": len(builder.prompts),
        "dropped": dict(builder.dropped),
        "truncated": dict(builder.truncated),
        **_sizes(builder),
        **reading.report(),
        "turns": dict(builder.turns),
        **({"teachers": named} if (named := rows_by_teacher([one.facts for one in builder.prompts])) else {}),
        "notes": dict(builder.encoder.take_notes()),
    }


def _nothing_left(builder: PromptBuilder) -> DataError:
    reading = builder.reading
    dropped = ", ".join(f"{count} x {reason}" for reason, count in builder.dropped.items()) or "empty"
    first = "".join(f"\n- {problem}" for problem in reading.first_dropped)
    where = f"{builder.dataset.title}: no row is left for {_path_of(builder.name)}"
    return DataError(f"{where}: {reading.rows} rows read; {dropped}{first}")


def _sizes(builder: PromptBuilder) -> dict[str, int]:
    """How many prompts have a response, and how many tokens there are; of pairs where there are some."""
    prompts = builder.prompts
    responses = [prompt.response_ids for prompt in prompts if prompt.response_ids is not None]
    rejected = [prompt.rejected_ids for prompt in prompts if prompt.rejected_ids is not None]
    return {
        "with_response": len(responses),
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
        "response_tokens": sum(map(len, responses)),
        **({"pairs": builder.pairs} if builder.pairs else {}),
        **({"rejected_tokens": sum(map(len, rejected))} if rejected else {}),
    }


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


class PromptBuilder:
    """Turns the rows of one dataset into prompts, and counts what it drops and truncates."""

    def __init__(
        self,
        name: str,
        dataset: DatasetConfig,
        config: DataConfig,
        encoder: Encoder,
        *,
        reading: Reading,
        needs: Collection[str] = (),
        teacher: TeacherReads | None = None,
    ) -> None:
        self.name = name
        self.reading = reading
        self.dataset = dataset
        self.config = config
        self.encoder = encoder
        self.needs = frozenset(needs)
        self.teacher = teacher or TeacherReads()
        self.contexts = config.teacher_context if name == "train" else {}
        self._before: Row | None = None
        """The row with a response that was read last, for what contexts show of another row."""
        self.prompts: list[Prompt] = []
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        """Turns of the assistant in kept rows: trained on, and only read as context."""
        self.pairs = 0
        """Kept rows that are preference pairs, whether the rejected response is used or not."""
        self.without_response: list[str] = []
        """The locations of rows without a response, or without a rejected one, that need it."""
        self.source_of: dict[str, int] = {}
        """Which dataset of a mixture each prompt is from, by its id."""

    def with_ids(self, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
        """(Id of the prompt, row); with `each_output` one for each output."""
        parts = self.dataset.parts()
        for number, row in enumerate(rows, start=1):
            if not row.has_prompt:
                problem = (
                    "holds plain text, no prompt: give the file as data.text, or name the field with the "
                    f"prompt, data.{self.name}.fields.prompt"
                )
                self.reading.drop_read(RowError(row.location, problem, ""), "plain text, no prompt")
                continue
            examples = row.per_reference() if parts[row.source].each_output else (row,)
            for index, one in enumerate(examples, start=1):
                id = f"{self.name}:{number}" + (f":{index}" if index > 1 else "")
                self.source_of[id] = row.source
                yield id, one

    def add(self, chunk: Sequence[tuple[str, Row]]) -> None:
        """Tokenise some rows and keep those that can be used."""
        usable = [(id, row) for id, row in chunk if self._usable(row)]
        encoded = self.encoder.encode([row for _, row in usable])
        others = self._encoded_others([row for _, row in usable])
        before = self._rows_before([row for _, row in usable])
        for (id, row), found, other, earlier in zip(usable, encoded, others, before, strict=True):
            refused = next((one for one in (found, other) if isinstance(one, RowError)), None)
            if refused is not None:
                self._refused(refused)
                continue
            assert isinstance(found, EncodedRow)
            prompt = self._for_teacher(self._to_prompt(id, row, found, earlier), row)
            if prompt is not None and isinstance(other, EncodedRow):
                add = self._with_rejected if REJECTED in self.needs else self._with_direct
                prompt = add(prompt, row, found, other)
            if prompt is not None:
                self.prompts.append(prompt)
                self.pairs += row.is_pair
                if prompt.response_ids is not None:
                    self.turns["trained on"] += found.trained_turns
                    self.turns["context"] += found.context_turns

    def _rows_before(self, rows: Sequence[Row]) -> list[Row | None]:
        """For each the row with a response that was read last before it."""
        found = []
        for row in rows:
            found.append(self._before)
            self._before = row if row.has_response else self._before
        return found

    def _refused(self, error: RowError) -> None:
        """Count a row that cannot be encoded, or raise."""
        if error.reason in (UNSPELLABLE, NO_ROW_BEFORE):
            self.dropped[error.reason] += 1
        else:
            self.reading.drop_read(error, error.reason)

    def _usable(self, row: Row) -> bool:
        if row.asks_nothing:
            self.dropped["empty prompt"] += 1
            return False
        if self._has_what_is_needed(row):
            return True
        if row.unlabelled:
            self.dropped["unlabelled"] += 1
        elif self.config.no_response == "drop":
            lacks = "no reasoning before the answer" if REASONING in self.needs else "no preference pair"
            self.dropped[lacks if row.has_response else "no response"] += 1
        else:
            self.without_response.append(row.location)
        return False

    def _has_what_is_needed(self, row: Row) -> bool:
        if REJECTED in self.needs and not row.is_pair:
            return False
        if REASONING in self.needs and without_chain(row) is None:
            return False
        return row.has_response or RESPONSES not in self.needs

    def _encoded_others(self, rows: Sequence[Row]) -> list[EncodedRow | RowError | None]:
        """The rejected responses, or the answers without their chain, rendered and tokenised as the response
        is; None where neither is needed."""
        if REJECTED in self.needs:
            return [*self.encoder.encode([row.rejected_row() for row in rows])]
        if REASONING in self.needs:
            direct = [without_chain(row) for row in rows]
            return [*self.encoder.encode([row for row in direct if row is not None])]
        return [None] * len(rows)

    def _with_rejected(
        self, prompt: Prompt, row: Row, chosen: EncodedRow, rejected: EncodedRow
    ) -> Prompt | None:
        """The prompt with its rejected response under the same length rules; None if it is dropped."""
        if rejected.prompt_ids != chosen.prompt_ids:
            problem = "as the template renders them, chosen and rejected response follow different prompts"
            self._refused(RowError(row.location, problem, "chosen and rejected of two prompts"))
            return None
        kept = self._kept_response(rejected, "rejected response")
        if kept is None:
            return None
        if kept == prompt.response_ids:
            self.dropped["chosen and rejected are the same tokens"] += 1
            return None
        if reason := self.teacher.cannot_read(prompt.token_ids, kept, prompt.teacher_ids, len(kept)):
            self.dropped[reason] += 1
            return None
        return replace(
            prompt,
            rejected_ids=kept,
            rejected_finished=kept == rejected.response_ids and row.rejected_finished,
            rejected_trained=None if rejected.trained is None else rejected.trained[: len(kept)],
        )

    def _with_direct(self, prompt: Prompt, row: Row, chain: EncodedRow, direct: EncodedRow) -> Prompt | None:
        """The prompt with its answer without the chain under the same length rules; None if it is dropped."""
        if direct.prompt_ids != chain.prompt_ids:
            problem = (
                "as the template renders them, the answer with reasoning and the one without follow "
                "different prompts; data.template: {kind: chat, reasoning: inline, empty_reasoning: omit} "
                "writes them alike"
            )
            self._refused(
                RowError(row.location, problem, "answers with and without reasoning of two prompts")
            )
            return None
        kept = self._kept_response(direct, "answer without its chain")
        return None if kept is None else replace(prompt, direct_ids=kept)

    def _to_prompt(self, id: str, row: Row, found: EncodedRow, before: Row | None) -> Prompt | None:
        config = self.config
        text, prompt_ids, response_ids = found.text, found.prompt_ids, found.response_ids
        if not prompt_ids:
            self.dropped["empty prompt"] += 1
            return None
        if len(prompt_ids) > config.max_prompt:
            rule = config.too_long.prompt
            truncated = None
            if rule != "drop" and found.answer is None:  # else the last turn is no part of the prompt
                truncated = truncate_prompt(row, self.encoder, config.max_prompt, rule)
            if truncated is None:
                self.dropped["prompt too long"] += 1
                return None
            self.truncated["prompt"] += 1
            row, text, prompt_ids = truncated
        kept_ids = self._kept_response(found)
        if kept_ids is None and response_ids is not None:
            return None
        try:
            read = {name: self._read_by(name, row, found, before) for name in (MAIN, *self.contexts)}
        except RowError as error:
            self._refused(error)
            return None
        if () in read.values():
            self.dropped["empty prompt"] += 1
            return None
        fixed = RESPONSES in self.needs and kept_ids is not None
        room = len(kept_ids or ()) if fixed else config.max_response
        for ids in read.values():
            if reason := self.teacher.cannot_read(prompt_ids, kept_ids, ids, room):
                self.dropped[reason] += 1
                return None
        teacher_ids = read.pop(MAIN)
        return Prompt(
            id,
            prompt_ids,
            text,
            kept_ids,
            kept_ids == response_ids and row.finished,
            None if kept_ids is None or found.trained is None else found.trained[: len(kept_ids)],
            row.references if found.answer is None else (found.answer,),
            teacher_ids=teacher_ids,
            context_ids={name: ids for name, ids in read.items() if ids is not None},
            fields=row.prompt_fields(),
            facts=row.extra,
        )

    def _for_teacher(self, prompt: Prompt | None, row: Row) -> Prompt | None:
        """The prompt with the teacher that its row is for; None if it is for none and dropped."""
        if prompt is None or self.config.row_teacher is None or self.name != "train":
            return prompt
        try:
            return self.config.row_teacher.named(prompt, row.location)
        except RowError as error:
            self._refused(error)
            return None

    def _kept_response(self, found: EncodedRow, name: str = "response") -> tuple[int, ...] | None:
        """The response within the length limit; None if there is none, or it is dropped and counted."""
        if found.response_ids is None:
            return None
        limit, rule = self.config.max_response, self.config.too_long.response
        kept = truncate_response(found.response_ids, limit, rule, self.truncated, name)
        if kept is None:
            self.dropped[f"{name} too long"] += 1
        elif found.trained is not None and not any(found.trained[: len(kept)]):
            self.dropped["no token to train on within the length limit"] += 1
            return None
        return kept

    def _read_by(
        self, teacher: str, row: Row, found: EncodedRow, before: Row | None
    ) -> tuple[int, ...] | None:
        """The prompt as a teacher reads it: in its tokens, with its context; None if it is the student's.

        Raises:
            RowError: the teacher's template refuses the row, cannot read its response, or its context asks
                for what the row does not have.
        """
        own, context = self.encoder.teacher if teacher == MAIN else None, self.contexts.get(teacher)
        if own is None and context is None:
            return None
        if found.trained is not None:
            problem = (
                "a response of several turns needs a teacher that reads the student's prompts: with its "
                "tokenizer and its chat template"
            )
            raise RowError(row.location, problem, "several turns for a teacher with prompts of its own")
        return (own or self.encoder).prompt(row if context is None else in_context(context, row, before))[1]

    def check_responses(self) -> None:
        """Raise if rows lack a response that they need.

        Raises:
            DataError: names the first of them.
        """
        missing = self.without_response
        if not missing:
            return
        first = ", ".join(missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        path = _path_of(self.name)
        way_out = ", or choose a method whose responses are generated" if self.name == "train" else ""
        lacks = "no response" + (" or no rejected one" if REJECTED in self.needs else "")
        needs = "a preference pair" if REJECTED in self.needs else "one"
        if REASONING in self.needs:
            lacks, needs = "no reasoning before the answer", "that"
        raise DataError(
            f"{first}{more}: {lacks}, but {path} needs {needs} in each row here. "
            f"Add them, or set data.no_response: drop{way_out}"
        )


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


def _with_progress(rows: Iterable[Row], name: str) -> Iterator[Row]:
    """The same rows, with a progress bar if there are many."""
    iterator = iter(rows)
    start = list(islice(iterator, _PROGRESS_ROWS))
    yield from start
    if len(start) < _PROGRESS_ROWS:
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(iterator, f"reading data.{name}", console=console, disable=not console.is_terminal)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _overlap_warnings(train: Sequence[Prompt], other: PromptSet) -> list[str]:
    """A warning if training prompts are in `other` too, equal token for token."""
    seen = {prompt.token_ids for prompt in train}
    both = sum(prompt.token_ids in seen for prompt in other.prompts)
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


def _path_of(name: str) -> str:
    """Where the configuration names the rows of a set."""
    return {"eval": "evaluate.data", "preference": "preference.data"}.get(name, f"data.{name}")


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
        f"{_path_of(one.name)} ({one.report['path']}): in {count} of {one.report['rows']} rows {note}"
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
    return [f"{_path_of(one.name)} ({report['path']}): {text}" for text in told]


def _where_to_look(lost: Iterable[str], bad_rows: Sequence[str]) -> str:
    first = "; the first bad rows: " + "; ".join(bad_rows) if bad_rows else ""
    by_length = any(reason.startswith(("prompt", "response")) for reason in lost)
    return first + (". See data.max_prompt, data.max_response and data.too_long" if by_length else "")
