"""The places of images in rendered text, and what a model's processor writes there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from stillhouse.core.images import IMAGE, ImageExpander
from stillhouse.data.rendering import Rendered
from stillhouse.data.rows import Message, Row
from stillhouse.errors import RowError

_LEADING = re.compile(rf"\A({IMAGE}+)(?=[^{IMAGE}\n])")


def expanded(found: Rendered, row: Row, expander: ImageExpander) -> Rendered:
    """A rendered row with the tokens of its images.

    A place is `IMAGE`, which templates without images carry along, or the image token that a chat template
    has written; the row's own texts hold neither.

    Raises:
        RowError: the template has left out an image or shows one twice, or the processor cannot read one.
    """
    token = expander.image_token
    place = re.compile(f"{IMAGE}|{re.escape(token)}")
    parts = found.response or ()
    count = sum(len(place.findall(text)) for text in (found.prompt, *(part.text for part in parts)))
    if count != len(row.images):
        raise RowError(
            row.location,
            f"shows {len(row.images)} images, and as the template renders it {count} ({token}). A chat "
            "template for images takes content parts; or set data.template: plain, alpaca or custom",
            "images that the template does not render",
        )
    try:
        texts = iter(expander.expand(row.images))
    except ValueError as error:
        problem = f"has an image that the model's processor cannot read: {error}"
        raise RowError(row.location, problem, "image that the processor cannot read") from error

    def filled(text: str) -> str:
        return place.sub(lambda mark: _with_marks(expander, mark.group(), next(texts)), text)

    prompt = filled(found.prompt)
    return replace(
        found,
        prompt=prompt,
        response=None
        if found.response is None
        else tuple(replace(part, text=filled(part.text)) for part in parts),
        shown=found.prompt.replace(IMAGE, expander.image_text),
        prompt_images=len(place.findall(found.prompt)),
    )


def _with_marks(expander: ImageExpander, mark: str, tokens: str) -> str:
    """The tokens of an image; with its family's marks around them where no chat template wrote these."""
    return tokens if mark != IMAGE else expander.image_text.replace(expander.image_token, tokens)


def on_lines(text: str) -> str:
    """A question with images before its text, these on a line of their own."""
    return _LEADING.sub(r"\1\n", text)


def with_content_parts(turn: Message) -> Message:
    """A turn whose content is a list of parts, texts and images."""
    return {**turn, "content": list(_parts(turn.get("content") or ""))}


def _parts(content: str) -> Iterator[dict[str, str]]:
    if not content:
        yield {"type": "text", "text": ""}
    for piece in re.split(f"({IMAGE})", content):
        if piece:
            yield {"type": "image"} if piece == IMAGE else {"type": "text", "text": piece}
