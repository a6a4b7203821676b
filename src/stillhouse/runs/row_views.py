"""Rows as the models of a run read them: prompt and response as text and tokens, or why a row is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, NamedTuple

from stillhouse.core.images import ImageRef
from stillhouse.core.types import Prompt
from stillhouse.data.config import DataConfig
from stillhouse.data.load import encoder_of
from stillhouse.data.prompt_builder import PromptBuilder
from stillhouse.data.reading import Reading
from stillhouse.data.rows import Row
from stillhouse.data.text_tokens import TextTokenizer
from stillhouse.data.tokenise import Encoder
from stillhouse.errors import DataError, RowError
from stillhouse.runs.config import RunConfig
from stillhouse.runs.tokenizers import tokenizers


class TextPiece(NamedTuple):
    """Neighbouring tokens of one kind, as text. Example: `TextPiece("<end>", trained=True, control=True)`"""

    text: str
    trained: bool
    control: bool
    """Whether they are control tokens, and not spelled by ordinary ones."""


@dataclass(frozen=True, slots=True)
class RowView:
    """A row of a dataset as the student and the teacher read it.

    Example: `RowView("train:1", "prompt/response", "A fruit?\\n", "Fig<end>", (21, 33), (7, 1), (1, 1))`
    """

    id: str
    """The id of its prompt; of a row that cannot be read, file and line."""
    format: str = ""
    prompt: str = ""
    """With the control tokens."""
    response: str | None = None
    prompt_ids: tuple[int, ...] = ()
    response_ids: tuple[int, ...] | None = None
    trained: tuple[int, ...] | None = None
    """For each token of the response 1 if it is trained on, else 0."""
    rejected: str | None = None
    """The rejected response of a preference pair; None if there is none, or the run does not use it."""
    rejected_ids: tuple[int, ...] | None = None
    rejected_trained: tuple[int, ...] | None = None
    teacher_prompt: str | None = None
    """What the teacher reads in place of the prompt; None without a teacher."""
    dropped: str | None = None
    """Why the row is left out."""
    prompt_pieces: tuple[TextPiece, ...] = ()
    response_pieces: tuple[TextPiece, ...] = ()
    rejected_pieces: tuple[TextPiece, ...] = ()
    images: tuple[ImageRef, ...] = ()
    """What prompt and response show, in the order of their tokens."""

    def as_json(self) -> dict[str, Any]:
        """The fields without the pieces, which follow from them; of images place, size and digest."""
        names = [
            one.name for one in fields(self) if not one.name.endswith("_pieces") and one.name != "images"
        ]
        facts = ("location", "width", "height", "digest")
        images = [{name: getattr(image, name) for name in facts} for image in self.images]
        return {name: getattr(self, name) for name in names} | ({"images": images} if images else {})


class _Witness(Reading):
    """A reading that drops bad rows and keeps what is wrong with each."""

    def __init__(self, ignore: Sequence[str]) -> None:
        super().__init__("drop", ignore)
        self.seen: list[tuple[DataError, str]] = []

    def drop_read(self, error: DataError, reason: str) -> None:
        """Count a row, and keep its error."""
        super().drop_read(error, reason)
        self.seen.append((error, reason))

    def taken(self) -> list[RowView]:
        """The rows that were dropped since the last call."""
        seen, self.seen = self.seen, []
        return [
            RowView(
                error.location if isinstance(error, RowError) else str(error), dropped=_told(error, reason)
            )
            for error, reason in seen
        ]


def row_views(config: RunConfig, name: str = "train") -> Iterator[RowView]:
    """The rows of one dataset of a run, in order. Loads tokenizers only, no weights.

    Args:
        config: the run.
        name: "train" or "valid".

    Raises:
        ModelError: a tokenizer cannot be had.
        DataError: a file is missing, or the run has no such dataset.
    """
    dataset = config.data.train if name == "train" else config.data.valid
    if dataset is None:
        raise DataError(f"data.{name}: the run has none")
    found = tokenizers(config)
    encoder = encoder_of(config.data, found.student, found.reads)
    data: DataConfig = config.data.model_copy(update={"bad_rows": "drop", "no_response": "drop"})
    reading = _Witness(config.data.ignore)
    needs = config.responses.requirements().data
    if name == "valid":
        needs = frozenset({"responses"})
    builder = PromptBuilder(name, dataset, data, encoder, reading=reading, teacher=found.reads, needs=needs)
    for id, row in builder.with_ids(dataset.rows(reading)):
        yield from reading.taken()
        before = builder.dropped.copy()
        builder.add([(id, row)])
        refused = reading.taken()
        if builder.prompts:
            yield _view(builder.prompts.pop(), row, encoder, config.teacher is not None)
        elif refused:
            yield RowView(id, row.format, dropped=refused[0].dropped)
        else:
            [reason] = builder.dropped - before
            yield _dropped(id, row, encoder, reason)
    yield from reading.taken()


def _view(prompt: Prompt, row: Row, encoder: Encoder, has_teacher: bool) -> RowView:
    text = shown_text(encoder.tokenizer, prompt.token_ids)
    teacher = text if has_teacher else None
    if has_teacher and prompt.teacher_ids is not None:
        reader = encoder if encoder.teacher is None else encoder.teacher
        teacher = shown_text(reader.tokenizer, prompt.teacher_ids)
    ids, rejected = prompt.response_ids, prompt.rejected_ids
    trained = None if ids is None else prompt.response_trained or (1,) * len(ids)
    rejected_trained = None if rejected is None else prompt.rejected_trained or (1,) * len(rejected)
    return RowView(
        prompt.id,
        row.format,
        text,
        None if ids is None else shown_text(encoder.tokenizer, ids),
        prompt.token_ids,
        ids,
        trained,
        None if rejected is None else shown_text(encoder.tokenizer, rejected),
        rejected,
        rejected_trained,
        teacher,
        prompt_pieces=_pieces(encoder.texts, prompt.token_ids),
        response_pieces=_pieces(encoder.texts, ids or (), trained),
        rejected_pieces=_pieces(encoder.texts, rejected or (), rejected_trained),
        images=(*prompt.images, *prompt.response_images),
    )


def _dropped(id: str, row: Row, encoder: Encoder, reason: str) -> RowView:
    """A row that was read and is left out, with its prompt where it has one."""
    if row.image_values:  # they were not opened
        return RowView(id, row.format, dropped=reason)
    [found] = encoder.encode([row])
    if isinstance(found, RowError):
        return RowView(id, row.format, dropped=_told(found, reason))
    prompt = shown_text(encoder.tokenizer, found.prompt_ids)
    pieces = _pieces(encoder.texts, found.prompt_ids)
    return RowView(id, row.format, prompt, prompt_ids=found.prompt_ids, dropped=reason, prompt_pieces=pieces)


def _told(error: DataError, reason: str) -> str:
    problem = error.problem if isinstance(error, RowError) else str(error)
    return f"{reason}: {problem}"


def shown_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text, control tokens included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _pieces(
    texts: TextTokenizer, ids: Sequence[int], trained: Sequence[int] | None = None
) -> tuple[TextPiece, ...]:
    """Tokens as text in pieces of one kind each."""
    marks = trained or (0,) * len(ids)
    kinds = [(bool(mark), token in texts.control_ids) for token, mark in zip(ids, marks, strict=True)]
    pieces: list[TextPiece] = []
    done, before = 0, ""
    for (mark, special), some in groupby(kinds):
        done += len(list(some))
        text = shown_text(texts.tokenizer, ids[:done])
        pieces.append(TextPiece(text[len(before) :], mark, special))
        before = text
    return tuple(pieces)
