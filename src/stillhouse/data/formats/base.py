"""What a row format is, the registry of formats, and the readers of fields that formats share.

A format is a subclass of `RowFormat` in a file of this folder, decorated with `register`. Detection, the
error message that lists the formats, the table in docs/data.md and the test of its example follow from that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from stillhouse.config import nearest
from stillhouse.data.rows import Fields, Message, Row
from stillhouse.errors import DataError

RawRow = Mapping[str, Any]
"""A row as the file has it."""

RESPONSE_FIELDS = ("outputs", "output", "response", "completion", "answer")
"""Where a response is looked for, in this order."""


class RowFormat(ABC):
    """One shape of dataset rows. The docstring of a subclass is its description in the docs."""

    name: ClassVar[str]
    """Its main fields, such as "instruction/input/output"."""
    precedence: ClassVar[int]
    """Formats are tried in ascending order: one whose rows another format would match too comes first."""
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


def read_row(raw: RawRow, fields: Fields, location: str) -> Row:
    """Parse a row by the first format that matches.

    Raises:
        DataError: no format matches, a field that `fields` names is missing, or a value has the wrong type.
    """
    for role, name in fields.model_dump(exclude_none=True).items():
        if name not in raw and role != "response":
            raise DataError(
                f"{location}: has no field {name!r} (fields.{role}){nearest(name, list(raw))}; "
                f"its fields: {', '.join(raw)}"
            )
    for row_format in FORMATS:
        if row_format.matches(raw, fields):
            return row_format.read(raw, fields, location)
    names = [row_format.name for row_format in FORMATS]
    raise DataError(
        f"{location}: no prompt found in the fields {', '.join(raw) or '(none)'}; understood are "
        f"{', '.join(names[:-1])} and {names[-1]}. Name the fields: fields: {{prompt: ..., response: ...}}"
    )


class PromptFieldFormat(RowFormat):
    """A prompt in one field, an optional input in another, and the response in any of `RESPONSE_FIELDS`."""

    prompt_field: ClassVar[str]

    def matches(self, raw: RawRow, fields: Fields) -> bool:
        return fields.prompt is None and fields.text is None and self.prompt_field in raw

    def read(self, raw: RawRow, fields: Fields, location: str) -> Row:
        prompt = fields.prompt or self.prompt_field
        responses = read_responses(raw, fields, location)
        response = responses[0] if responses else None
        response_field = fields.response or first_field(raw, RESPONSE_FIELDS)
        if isinstance(raw[prompt], list):
            return Row(
                location,
                messages=read_messages(raw[prompt], prompt, location),
                response=response,
                references=responses,
                extra=other_fields(raw, prompt, response_field),
            )
        given = fields.input or first_field(raw, ("input",))
        return Row(
            location,
            instruction=read_string(raw[prompt], prompt, location),
            input=read_string(raw[given], given, location) if given and raw[given] is not None else "",
            response=response,
            references=responses,
            extra=other_fields(raw, prompt, given, response_field),
        )


def read_responses(raw: RawRow, fields: Fields, location: str) -> tuple[str, ...]:
    """All responses of a row, without blank ones; of a list of messages, the last one's content."""
    name = fields.response or first_field(raw, RESPONSE_FIELDS)
    if name is None or raw.get(name) is None:
        return ()
    value = raw[name]
    values = value if isinstance(value, list) else [value]
    if values and all(isinstance(item, Mapping) for item in values):
        values = [read_messages(values, name, location)[-1]["content"]]
    texts = (read_string(item, name, location) for item in values)
    return tuple(text for text in texts if text.strip())


def read_messages(value: Any, name: str, location: str) -> tuple[Message, ...]:
    """A list of `{role, content}`; other keys of a turn are ignored."""
    messages = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise DataError(
                f"{location}: turn {number} of {name!r} should be {{role, content}}, got {turn!r:.80}"
            )
        content = read_string(turn.get("content"), f"{name}[{number}].content", location)
        messages.append({"role": turn["role"], "content": content})
    return tuple(messages)


def read_string(value: Any, name: str, location: str) -> str:
    """The value of the field `name`, which must be a string."""
    if not isinstance(value, str):
        raise DataError(
            f"{location}: field {name!r} should be text, got {type(value).__name__} {value!r:.80}"
        )
    return value


def first_field(raw: RawRow, names: tuple[str, ...]) -> str | None:
    """The first of `names` that the row has."""
    return next((name for name in names if name in raw), None)


def other_fields(raw: RawRow, *used: str | None) -> dict[str, Any]:
    """The fields that are not `used`."""
    return {name: value for name, value in raw.items() if name not in used}
