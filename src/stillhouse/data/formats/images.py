"""Where the images of a row stand: parts of a content, marks in a text, a column beside the conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stillhouse.core.images import IMAGE, IMAGE_MARK
from stillhouse.data.formats.values import as_list, is_blank, parsed_text, shortened
from stillhouse.data.rows import Fields, Message, Row
from stillhouse.errors import RowError

IMAGE_FIELDS = ("images", "image")
"""Columns in which images are looked for."""
IMAGE_PARTS = ("image", "image_url", "input_image")
"""The types of content parts that are images: of transformers, and of OpenAI's two interfaces."""
MISCOUNTED = "images and their places differ in number"
"""The reason of rows with more or fewer places than images."""

_VALUE_KEYS = ("image_url", "image", "url", "path", "base64", "source", "data", "bytes")
_LEADING = re.compile(rf"\A\s*((?:{IMAGE}\s*)*{IMAGE})\n")
_TRAILING = re.compile(rf"\n({IMAGE}(?:\s*{IMAGE})*)\s*\Z")


def image_of_part(part: Mapping[str, Any], name: str, location: str) -> Any:
    """What a content part of an image holds; None if it only says where an image of the row's column stands.

    Raises:
        RowError: it is a file on somebody's server.
    """
    if not is_blank(part.get("file_id")):
        raise RowError(
            location,
            f"{name} is the file_id {part['file_id']!r}, which only OpenAI's server can open; give a path, a "
            "data URL or bytes",
            "image on a server",
        )
    value = next((part[key] for key in _VALUE_KEYS if not is_blank(part.get(key))), None)
    if isinstance(value, Mapping) and "bytes" not in value and "path" not in value:
        return next((value[key] for key in ("url", "data", "base64") if not is_blank(value.get(key))), None)
    return value


def column_of(raw: Mapping[str, Any], fields: Fields, location: str) -> tuple[tuple[str, ...], list[Any]]:
    """The names of the columns with the images of a row, and these.

    Raises:
        RowError: two columns hold different images.
    """
    usual = (fields.images,) if fields.images is not None else IMAGE_FIELDS
    names = tuple(name for name in usual if name in raw)
    filled = [name for name in names if not is_blank(raw[name])]
    if not filled:
        return names, []
    found = [_listed(raw[name]) for name in filled]
    if len(found) > 1 and found[1] != found[0]:
        raise RowError(
            location,
            f"fields {filled[0]!r} and {filled[1]!r} both hold images; choose one: "
            f"fields: {{images: {filled[0]}}} with data.ignore: [{filled[1]}]",
            "two fields for one part of the prompt",
        )
    return names, found[0]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        value = parsed_text(value)
    if isinstance(value, Mapping) and "bytes" in value and not isinstance(value["bytes"], list):
        return [value]
    value = as_list(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def with_images(row: Row, column: Sequence[Any]) -> Row:
    """The row with its images beside it and one `IMAGE` in its texts for each, in the same order.

    Images are in content parts, each where it stands, or in a column. Of a column they stand where a content
    part is an image without a value; else where a text before an answer has `<image>`; else all before the
    first question.

    Args:
        row: as its format read it; turns with image parts hold these under `images`.
        column: the images beside the conversation.

    Raises:
        RowError: there are more or fewer places than images, or one is in an answer.
    """
    turns = (*row.messages, *row.completion)
    in_parts = [value for turn in turns for value in turn.get("images", ())]
    in_rejected = any(turn.get("images") for turn in row.rejected_completion)
    if not column and not in_parts and not in_rejected:
        return row
    if any(turn["role"] == "assistant" and turn.get("images") for turn in turns) or in_rejected:
        raise RowError(
            row.location, "has an image in an answer, and models answer in text", "image in an answer"
        )
    if not row.has_prompt:
        raise RowError(
            row.location, "is plain text with images; give it as a prompt", "plain text with images"
        )
    if not in_parts:
        row = _marked(row, len(column))
        values = list(column)
    elif None not in in_parts:
        if column:
            problem = "has images both in its turns and in a column; leave one out: data.ignore: [images]"
            raise RowError(row.location, problem, "images in two places")
        values = in_parts
    else:
        places = in_parts.count(None)
        if len(in_parts) > places or places != len(column):
            raise _miscounted(row.location, len(in_parts), len(column))
        values = list(column)
    row = replace(
        row, messages=_plain(row.messages), completion=_plain(row.completion), image_values=tuple(values)
    )
    found = sum(text.count(IMAGE) for text in _questions(row))
    if found != len(values) or any(IMAGE in text for text in _answers(row)):
        problem = "has a text with U+FDD0, which Unicode keeps from being text, beside its images"
        raise RowError(row.location, problem, "text that stands for an image")
    return row


def _marked(row: Row, count: int) -> Row:
    """The row with its `<image>` marks, or without any the beginning of its question, as places of images."""
    texts = list(_questions(row))
    ready = sum(text.count(IMAGE) for text in texts)
    marks = sum(text.count(IMAGE_MARK) for text in texts)
    if ready == count:
        return row
    if marks == count:
        return _changed(row, _without_line_breaks)
    if marks:
        raise _miscounted(row.location, marks, count)
    return _before_question(row, IMAGE * count)


def _without_line_breaks(text: str) -> str:
    """A text with its marks as places; the line break between a mark and the text is the mark's."""
    if IMAGE_MARK not in text:
        return text
    text = text.replace(IMAGE_MARK, IMAGE)
    leading = _LEADING.sub(lambda found: "".join(found[1].split()), text)
    return _TRAILING.sub(lambda found: "".join(found[1].split()), leading)


def _before_question(row: Row, places: str) -> Row:
    if not row.messages:
        return replace(row, instruction=places + row.instruction)
    first = next((at for at, turn in enumerate(row.messages) if turn["role"] == "user"), None)
    if first is None:
        raise RowError(row.location, "has images and no turn of the user to show them in", "no question")
    turn = row.messages[first]
    shown = {**turn, "content": places + turn["content"]}
    return replace(row, messages=(*row.messages[:first], shown, *row.messages[first + 1 :]))


def _changed(row: Row, change: Any) -> Row:
    """The row with each text that is no answer changed."""

    def turn(message: Message) -> Message:
        if message["role"] == "assistant":
            return message
        return {**message, "content": change(message["content"])}

    return replace(
        row,
        instruction=change(row.instruction),
        input=change(row.input),
        messages=tuple(map(turn, row.messages)),
        completion=tuple(map(turn, row.completion)),
    )


def _plain(turns: Sequence[Message]) -> tuple[Message, ...]:
    return tuple({name: turn[name] for name in turn if name != "images"} for turn in turns)


def _questions(row: Row) -> Iterator[str]:
    yield row.instruction
    yield row.input
    yield from (turn["content"] for turn in (*row.messages, *row.completion) if turn["role"] != "assistant")


def _answers(row: Row) -> Iterator[str]:
    yield from (row.response or "", row.rejected or "")
    turns = (*row.messages, *row.completion, *row.rejected_completion)
    yield from (turn["content"] for turn in turns if turn["role"] == "assistant")


def _miscounted(location: str, places: int, count: int) -> RowError:
    problem = (
        f"number of images: {count}; places for them ({IMAGE_MARK} in a text, or content parts of the type "
        f"image without a value): {places}"
    )
    return RowError(location, problem, MISCOUNTED)


def read_turn_images(turn: Mapping[str, Any], content: str, location: str) -> tuple[str, list[Any]]:
    """The content of a turn that has its images in a field of its own, and these.

    They stand where the content has `<image>`, else before it.

    Raises:
        RowError: there are more or fewer marks than images.
    """
    name = next((name for name in IMAGE_FIELDS if not is_blank(turn.get(name))), None)
    if name is None:
        return content, []
    values = _listed(turn[name])
    marks = content.count(IMAGE_MARK)
    if marks == len(values):
        return _without_line_breaks(content), values
    if marks:
        raise _miscounted(location, marks, len(values))
    return IMAGE * len(values) + content, values


def holds_images(value: Any) -> bool:
    """Whether a value of a row is an encoded or decoded image, or a list of such."""
    if isinstance(value, list | tuple):
        return bool(value) and holds_images(value[0])
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, bytes | bytearray) or hasattr(value, "opened") or hasattr(value, "getexif")


def shown_value(value: Any) -> str:
    """An image as a file has it, for messages: its path or URL; empty for bytes."""
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, str) and not value.startswith("data:"):
        return shortened(value).strip("'\"") if len(value) < 200 else ""
    return ""
