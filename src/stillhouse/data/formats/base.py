"""What a row format is, the registry of formats, and how a row is read by the first that matches.

A format is a subclass of `RowFormat` in a file of this folder, decorated with `register`. Detection, the
error message that lists the formats, the table in docs/data.md and the test of its example follow from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import ClassVar, TypeVar

from stillhouse.config import nearest
from stillhouse.data.formats.images import column_of, holds_images, with_images
from stillhouse.data.formats.values import RawRow, is_blank
from stillhouse.data.rows import Fields, Row
from stillhouse.errors import RowError
from stillhouse.files import STAGE

SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
INPUT_FIELDS = ("input", "context")
HISTORY_FIELDS = ("history",)
TOOLS_FIELDS = ("tools", "functions")
MEDIA_FIELDS = ("videos", "video", "audio", "audios")
PROMPT_PARTS = (*SYSTEM_FIELDS, *INPUT_FIELDS, *HISTORY_FIELDS, *TOOLS_FIELDS, *MEDIA_FIELDS)
"""Fields that change the prompt: a row is refused if it has one that its format does not read."""

CUT = ("finished", "rejected_finished")
"""Under the key `STAGE` of a row of a stage file these are false where its response, or the rejected one, was
cut at the length limit."""

OPTIONAL_ROLES = frozenset({"input", "system", "history", "tools", "reasoning", "response", "images"})
"""Roles of `fields` that a row may lack."""


class RowFormat(ABC):
    """One shape of dataset rows. The docstring of a subclass is its description in the docs."""

    name: ClassVar[str]
    """Its main fields, such as "instruction/input/output"."""
    precedence: ClassVar[int]
    """Formats are tried in ascending order: one whose rows another format would match too comes first."""
    reads: ClassVar[str]
    """The fields that it reads, for the docs."""
    example: ClassVar[str]
    """A typical row, as JSON."""
    parsed: ClassVar[Row]
    """`example` as read from the location "example"."""

    @abstractmethod
    def matches(self, raw: RawRow, fields: Fields) -> bool:
        """Whether a row has this format; `fields` that the user named take precedence over detection."""

    @abstractmethod
    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        """Parse a row that matches.

        Raises:
            DataError: a value has the wrong type.
        """


FORMATS: list[RowFormat] = []
"""One instance of each format, in the order in which they are tried."""

FormatT = TypeVar("FormatT", bound=RowFormat)


def register(cls: type[FormatT]) -> type[FormatT]:
    """Add a format. A name or precedence that is taken is refused."""
    for known in FORMATS:
        if known.name == cls.name or known.precedence == cls.precedence:
            raise ValueError(f"{cls.__name__} has the name or the precedence of {type(known).__name__}")
    FORMATS.append(cls())
    FORMATS.sort(key=lambda row_format: row_format.precedence)
    return cls


def format_of(raw: RawRow, fields: Fields) -> RowFormat | None:
    """The first format that matches a row."""
    return next((known for known in FORMATS if known.matches(raw, fields)), None)


def read_row(raw: RawRow, fields: Fields, location: str, ignore: Collection[str] = ()) -> Row:
    """Parse a row by the first format that matches.

    Args:
        raw: the row as the file has it.
        fields: which field holds what, where the user said so.
        location: file and line.
        ignore: fields that are read as if they were not there; they stay among the row's facts.

    Raises:
        RowError: no format matches, a field that `fields` names is missing, a value has the wrong type, or a
            field that would change the prompt is not read.
    """
    mark = raw.get(STAGE)
    cut = {name for name in CUT if isinstance(mark, Mapping) and mark.get(name) is False}
    hidden = {*ignore, STAGE} if cut else ignore
    seen = {name: value for name, value in raw.items() if name not in hidden} if hidden else raw
    for role, name in fields.named.items():
        if name not in seen and role not in OPTIONAL_ROLES:
            raise RowError(
                location,
                f"has no field {name!r} (fields.{role}){nearest(name, list(seen))}; "
                f"its fields: {', '.join(seen)}",
                "field missing",
            )
    columns, images = column_of(seen, fields, location)
    text = {name: value for name, value in seen.items() if name not in columns} if columns else seen
    found = format_of(text, fields)
    if found is None:
        raise _unknown_format(seen, location)
    row = with_images(found.read(text, fields, location), images)
    _check_prompt_parts(row, found)
    ignored = {name: raw[name] for name in ignore if name in raw and not holds_images(raw[name])}
    return replace(
        row,
        format=found.name,
        extra={**row.extra, **ignored} if ignored else row.extra,
        finished=row.finished and "finished" not in cut,
        rejected_finished=row.rejected_finished and "rejected_finished" not in cut,
    )


def _unknown_format(raw: RawRow, location: str) -> RowError:
    names = [row_format.name for row_format in FORMATS]
    named = {part for name in names for part in name.split("/")}
    null = [name for name in raw if name in named and raw[name] is None]
    if null:
        return RowError(
            location, f"field {null[0]!r} is null, and no other field holds a prompt", "no prompt"
        )
    return RowError(
        location,
        f"no prompt found in the fields {', '.join(raw) or '(none)'}; understood are "
        f"{', '.join(names[:-1])} and {names[-1]}. Name the fields: fields: {{prompt: ..., response: ...}}",
        "no known format",
    )


def _check_prompt_parts(row: Row, row_format: RowFormat) -> None:
    """Refuse a row with a field that would change the prompt and was not read."""
    if not row.has_prompt:
        return
    for name, value in row.extra.items():
        if not is_blank(value) and (name in PROMPT_PARTS or holds_images(value)):
            named = f" or name it: fields: {{images: {name}}}" if holds_images(value) else ""
            raise RowError(
                row.location,
                f"field {name!r} would change the prompt, and rows of {row_format.name} are read without it. "
                f"If it is not part of the prompt, set data.ignore: [{name}]{named}",
                "field that changes the prompt is not read",
            )
